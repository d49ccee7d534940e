"""Diffusion: noise levels and forms, denoisers, sampling. What diffusion methods stand on."""

from kdlm.diffusion.denoiser import Condition, Denoiser, guided
from kdlm.diffusion.diffusers_models import DiffusersDenoiser
from kdlm.diffusion.draws import Draws
from kdlm.diffusion.forms import FlowMatching, Form, TrigFlow, VarianceExploding, VariancePreserving
from kdlm.diffusion.level import Level, moved, over
from kdlm.diffusion.loading import load_denoiser, look_for_denoiser
from kdlm.diffusion.sampling import ODE, FewSteps, follow, generate, levels_of
from kdlm.diffusion.small import MixtureDenoiser, ResidualDenoiser, edm_loss
from kdlm.diffusion.times import AnyTimes, Karras, LogitNormal, LogNormal, UniformTime, karras_ratios

__all__ = [
    "ODE",
    "AnyTimes",
    "Condition",
    "Denoiser",
    "DiffusersDenoiser",
    "Draws",
    "FewSteps",
    "FlowMatching",
    "Form",
    "Karras",
    "Level",
    "LogNormal",
    "LogitNormal",
    "MixtureDenoiser",
    "ResidualDenoiser",
    "TrigFlow",
    "UniformTime",
    "VarianceExploding",
    "VariancePreserving",
    "edm_loss",
    "follow",
    "generate",
    "guided",
    "karras_ratios",
    "levels_of",
    "load_denoiser",
    "look_for_denoiser",
    "moved",
    "over",
]
