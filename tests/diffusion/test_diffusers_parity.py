"""One step of diffusers' own schedulers is one of ours, from the same network."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tiny_diffusers import condition, dit, pixart, sd3, text_unet, unet

from kdlm.diffusion import DiffusersDenoiser, Level, levels_of, moved

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Euler's set_timesteps

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {**SCALED, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def seen(net: Any) -> tuple[int, list[str]]:
    """Channels of a network's samples, and what it is told of them."""
    kinds = {"UNet2DConditionModel": ["encoder_hidden_states"], "SD3Transformer2DModel": ["encoder_hidden_states"]}
    keys = kinds.get(type(net).__name__, ["labels"])
    return net.config.in_channels, keys + ["pooled_projections"] * (type(net).__name__ == "SD3Transformer2DModel")


def asked(net: Any, scheduler: Any, t: Any, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The network's output as diffusers' pipelines ask for it, and the condition."""
    channels, keys = seen(net)
    told = condition(len(x), *keys)
    names = {"labels": "class_labels"}
    shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    arguments = {names.get(key, key): value for key, value in told.items()}
    output = net(shown, timestep=t.expand(len(x)), return_dict=False, **arguments)[0]
    return output[:, :channels], told


def one(level: Callable[[], float], batch: int) -> torch.Tensor:
    return torch.full((batch,), float(level), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [*({"prediction_type": kind} for kind in PREDICTIONS), SCALED, COSINE, ZERO_SNR],
    ids=[*PREDICTIONS, "scaled", "cosine", "zero terminal snr"],
)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
@torch.no_grad()
def test_a_step_on_a_table_of_betas_is_that_of_diffusers(name: str, options: dict) -> None:
    extra = {} if name == "EulerDiscreteScheduler" else {"clip_sample": False}
    scheduler = getattr(diffusers, name)(**{"timestep_spacing": "leading", **options, **extra})
    net = unet().double()
    denoiser = DiffusersDenoiser(net, scheduler)
    scheduler.set_timesteps(10)
    for place in (0, 4, 8):
        t, after = scheduler.timesteps[place], scheduler.timesteps[place + 1]
        at, to = (denoiser.form.level(one(x, 3)) for x in (t, after))
        noised = torch.randn(3, 1, 8, 8, dtype=torch.float64)
        if name == "EulerDiscreteScheduler":
            at, to = (Level(torch.ones_like(level.alpha), level.ratio) for level in (at, to))
            noised = noised * float(scheduler.sigmas[place])
            scheduler._step_index = place
        output, told = asked(net, scheduler, t, noised)
        theirs = scheduler.step(output, t, noised)
        clean = denoiser(noised, at, told)
        largest = float(clean.abs().max())  # epsilon near pure noise is divided by alpha
        torch.testing.assert_close(clean, theirs.pred_original_sample, rtol=1e-5, atol=2e-6 * largest)
        if name != "DDPMScheduler":  # whose step adds noise
            ours = moved(noised, clean, at, to)
            torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-5, atol=2e-6 * largest)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LCMScheduler"])
def test_noise_is_added_as_in_diffusers_training(name: str) -> None:
    scheduler = getattr(diffusers, name)(**SCALED)
    denoiser = DiffusersDenoiser(unet(), scheduler)
    clean, noise, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    ours = denoiser.form.level(t.double()).noised(clean, noise).float()
    torch.testing.assert_close(ours, scheduler.add_noise(clean, noise, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.no_grad()
def test_a_step_of_flow_matching_is_that_of_diffusers(shift: float) -> None:
    net, scheduler = sd3().double(), diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    denoiser = DiffusersDenoiser(net, scheduler)
    scheduler.set_timesteps(6)
    for place in (0, 2, 5):
        t, sigmas = scheduler.timesteps[place].double(), scheduler.sigmas[place : place + 2]
        at, to = (denoiser.form.level(one(sigma, 3)) for sigma in sigmas)
        noised = torch.randn(3, 4, 8, 8, dtype=torch.float64)
        output, told = asked(net, scheduler, t, noised)
        scheduler._step_index = place
        theirs = scheduler.step(output, scheduler.timesteps[place], noised).prev_sample
        torch.testing.assert_close(moved(noised, denoiser(noised, at, told), at, to), theirs, rtol=1e-5, atol=1e-5)
    clean, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    scheduler._step_index = None
    noised = scheduler.scale_noise(clean, scheduler.timesteps[2:3].expand(3), noise)
    level = denoiser.form.level(scheduler.sigmas[2:3].expand(3))
    torch.testing.assert_close(level.noised(clean, noise), noised, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_a_step_of_edm_is_that_of_diffusers(kind: str) -> None:
    net, scheduler = unet().double(), diffusers.EDMEulerScheduler(sigma_data=0.7, prediction_type=kind)
    denoiser = DiffusersDenoiser(net, scheduler)
    scheduler.set_timesteps(6)
    for place in (0, 3, 4):
        sigmas = scheduler.sigmas[place : place + 2].double()
        at, to = (denoiser.form.level(sigma.expand(3)) for sigma in sigmas)
        noised = torch.randn(3, 1, 8, 8, dtype=torch.float64) * sigmas[0]
        scheduler._step_index = place
        output, told = asked(net, scheduler, scheduler.timesteps[place], noised)
        theirs = scheduler.step(output, scheduler.timesteps[place], noised).prev_sample
        ours = moved(noised, denoiser(noised, at, told), at, to)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_continuous_times_of_euler_are_edms() -> None:
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_min": 0.01, "sigma_max": 50.0}
    net, scheduler = unet().double(), diffusers.EulerDiscreteScheduler(**options, use_karras_sigmas=True)
    denoiser = DiffusersDenoiser(net, scheduler)
    scheduler.set_timesteps(6)
    for place in (0, 3, 4):
        at, to = (denoiser.form.level(s.double().expand(3)) for s in scheduler.sigmas[place : place + 2])
        noised = torch.randn(3, 1, 8, 8, dtype=torch.float64) * scheduler.sigmas[place]
        scheduler._step_index = place
        output, told = asked(net, scheduler, scheduler.timesteps[place], noised)
        theirs = scheduler.step(output, scheduler.timesteps[place], noised).prev_sample
        torch.testing.assert_close(moved(noised, denoiser(noised, at, told), at, to), theirs, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_network_answers_alike_on_every_path_through_the_same_ray() -> None:
    denoiser = DiffusersDenoiser(text_unet().double(), diffusers.DDIMScheduler(**SCALED))
    (level,) = levels_of(denoiser, [400.0], 2, torch.zeros(1, dtype=torch.float64))
    noised, told = torch.randn(2, 4, 8, 8).double(), condition(2, "encoder_hidden_states")
    other = Level(torch.ones_like(level.alpha), level.ratio)
    there = denoiser(noised / level.alpha[:, None, None, None], other, told)
    torch.testing.assert_close(there, denoiser(noised, level, told), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [dit, pixart])
@torch.no_grad()
def test_a_learned_variance_is_cut_off(make: Callable) -> None:
    net, scheduler = make().double(), diffusers.DDIMScheduler(clip_sample=False)
    denoiser = DiffusersDenoiser(net, scheduler)
    noised, t = torch.randn(3, 4, 8, 8).double(), torch.tensor([500.0] * 3).double()
    told = condition(3, *denoiser.takes)
    told = {key: value.double() if value.is_floating_point() else value for key, value in told.items()}
    clean = denoiser(noised, denoiser.form.level(t), told)
    names = {"labels": "class_labels"}
    more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if make is pixart else {}
    output = net(noised, timestep=t, return_dict=False, **{names.get(k, k): v for k, v in told.items()}, **more)[0]
    alpha = scheduler.alphas_cumprod[500].double()
    theirs = (noised - (1 - alpha).sqrt() * output[:, :4]) / alpha.sqrt()
    assert output.shape[1] == 8
    torch.testing.assert_close(clean, theirs, rtol=1e-5, atol=1e-5)
