"""Diffusion: noise levels and forms, denoisers, sampling. What diffusion methods stand on."""

from kdlm.diffusion.boundary import Boundary
from kdlm.diffusion.denoiser import Condition, Denoiser, guided
from kdlm.diffusion.diffusers_models import DiffusersDenoiser
from kdlm.diffusion.draws import Draws
from kdlm.diffusion.forms import FlowMatching, Form, TrigFlow, VarianceExploding, VariancePreserving
from kdlm.diffusion.jvp import Differentiation, derivative, rewound
from kdlm.diffusion.level import Level, moved, over
from kdlm.diffusion.loading import load_denoiser, look_for_denoiser
from kdlm.diffusion.sampling import ODE, FewSteps, follow, generate, levels_of, stepped
from kdlm.diffusion.small import MixtureDenoiser, ResidualDenoiser, edm_loss
from kdlm.diffusion.solver import AnyGrid, Solver, grid_levels
from kdlm.diffusion.times import AnyTimes, Karras, LogitNormal, LogNormal, UniformTime, karras_ratios

__all__ = [
    "ODE",
    "AnyGrid",
    "AnyTimes",
    "Boundary",
    "Condition",
    "Denoiser",
    "Differentiation",
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
    "Solver",
    "TrigFlow",
    "UniformTime",
    "VarianceExploding",
    "VariancePreserving",
    "derivative",
    "edm_loss",
    "follow",
    "generate",
    "grid_levels",
    "guided",
    "karras_ratios",
    "levels_of",
    "load_denoiser",
    "look_for_denoiser",
    "moved",
    "over",
    "rewound",
    "stepped",
]
