"""The sandbox: real small models and data, made on any machine without a hub.

Importing it is quick: torch and transformers come with a build.
"""

from kdlm.sandbox.catalog import Entry, build, is_built, names
from kdlm.sandbox.sections import SandboxData, SandboxModel

__all__ = ["Entry", "SandboxData", "SandboxModel", "build", "is_built", "names"]
