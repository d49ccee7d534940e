"""Denoisers around the models of `diffusers`: the network as it is, and what its scheduler says that it means."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdlm.diffusion.denoiser import Condition, Denoiser, Prediction
from kdlm.diffusion.forms import FlowMatching, Form, VarianceExploding, VariancePreserving
from kdlm.diffusion.level import over

TEXT = {"encoder_hidden_states": "encoder_hidden_states", "encoder_attention_mask": "encoder_attention_mask"}
TAKES: dict[str, dict[str, str]] = {
    "UNet2DModel": {"labels": "class_labels"},
    "UNet2DConditionModel": {"labels": "class_labels", **TEXT, "pooled_projections": "text_embeds"},
    "DiTTransformer2DModel": {"labels": "class_labels"},
    "PixArtTransformer2DModel": TEXT,
    "SD3Transformer2DModel": {
        "encoder_hidden_states": "encoder_hidden_states",
        "pooled_projections": "pooled_projections",
    },
}
"""What each network that is known here is told of a sample: key of the condition -> argument of its forward."""
STEM, NULL = "diffusion_pytorch_model", "null_condition.safetensors"


class Meaning(NamedTuple):
    """What a scheduler says about the network it was saved with.

    Attributes:
        form: the path of noise levels it was trained on.
        prediction: what its output means on that path.
        steps: factor from the form's time to the network's.
        sigma_data: of EDM's preconditioning (arXiv 2206.00364, table 1), which then is done here; None without.
        sign: of the network's output in that preconditioning; -1 where it predicts v.
    """

    form: Form
    prediction: Prediction
    steps: float = 1.0
    sigma_data: float | None = None
    sign: float = 1.0


def meaning_of(scheduler: Any) -> Meaning:
    """Read a scheduler. How it samples (spacing, shift, order) does not matter here, only what it was trained on.

    A scheduler that works on the variance-exploding path, as EulerDiscrete, shows the network `x / sqrt(sigma^2 + 1)`,
    which is `x_t` of the variance-preserving path: the two say the same. Raises ValueError for any other family.
    """
    name, config = type(scheduler).__name__, scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return Meaning(FlowMatching(), "flow", steps=config["num_train_timesteps"])
    continuous = config.get("timestep_type") == "continuous" and kind == "v_prediction"
    if name.startswith("EDM") or continuous:
        form = VarianceExploding(config.get("sigma_min") or 0.002, config.get("sigma_max") or 80.0)
        return Meaning(form, "sample", 1.0, config.get("sigma_data", 1.0), -1.0 if kind == "v_prediction" else 1.0)
    if hasattr(scheduler, "alphas_cumprod") and kind in ("epsilon", "v_prediction", "sample"):
        return Meaning(VariancePreserving(scheduler.alphas_cumprod), kind)
    raise ValueError(f"{name} with prediction_type {kind!r}: no scheduler of a family that is known here")


class DiffusersDenoiser(Denoiser):
    """A network of diffusers as a denoiser; it may be in bfloat16, x_0 is in float32 at least.

    Of a condition the network is given the keys that it takes (`TAKES`). Labels are never dropped at random, as a
    DiT does in training: which samples go without is the method's to say. A learned variance is cut off.

    Args:
        net: one of `TAKES`.
        scheduler: of diffusers, that the network was saved with.
        sample_size: height and width of a sample; None takes the network's own.
        null_class: the label that stands for none; a DiT has its own.
        null_condition: the embeddings that stand for no text (`encoder_hidden_states` `[length, width]`, and where
            the network takes them `pooled_projections` and `encoder_attention_mask`), or `zeros`, as of SDXL.

    Raises ValueError for a network or scheduler that is not known here.
    """

    def __init__(
        self,
        net: Any,
        scheduler: Any,
        *,
        sample_size: int | None = None,
        null_class: int | None = None,
        null_condition: dict[str, Tensor] | Literal["zeros"] | None = None,
    ):
        super().__init__()
        self.kind, config = type(net).__name__, net.config
        check_kind(self.kind)
        self.net, self.scheduler, self.meaning = net, scheduler, meaning_of(scheduler)
        self.form, self.prediction = self.meaning.form, self.meaning.prediction
        self.channels = config["in_channels"]
        if config["out_channels"] not in (None, self.channels, 2 * self.channels):
            raise ValueError(f"{self.kind} makes {config['out_channels']} channels of {self.channels}: no denoiser")
        size = sample_size or config["sample_size"]
        if size is None:
            raise ValueError(f"{self.kind} does not say how large its samples are: give `sample_size`")
        self.shape = (self.channels, *((size, size) if isinstance(size, int) else size))
        self.null_class = config["num_embeds_ada_norm"] if self.kind == "DiTTransformer2DModel" else null_class
        self.zeros, stored = null_condition == "zeros", null_condition if isinstance(null_condition, dict) else {}
        self.stored = tuple(stored)
        for key, value in stored.items():
            self.register_buffer(f"null_{key}", value, persistent=False)
        self.takes = {key: name for key, name in TAKES[self.kind].items() if _taken(key, net)}
        for module in net.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0

    @property
    def takes_guidance(self) -> bool:
        """Whether the scale of guidance is an input of the network, as of an LCM (arXiv 2310.04378)."""
        return self.net.config.get("time_cond_proj_dim") is not None

    def predict(self, noised: Tensor, time: Tensor, condition: Condition | None, guidance: Tensor | None) -> Tensor:
        data = self.meaning.sigma_data
        if data is None:
            return self._network(noised, time * self.meaning.steps, condition, guidance).to(noised.dtype)
        sigma = over(time, noised)
        total = sigma.square() + data**2
        inner = self._network(noised * total.rsqrt(), time.log() / 4, condition, guidance).to(noised.dtype)
        return noised * data**2 / total + self.meaning.sign * inner * sigma * data * total.rsqrt()

    def _network(self, x: Tensor, time: Tensor, condition: Condition | None, guidance: Tensor | None) -> Tensor:
        dtype = self.net.dtype
        told: dict[str, Any] = {self.takes[key]: value for key, value in (condition or {}).items() if key in self.takes}
        told = {name: value.to(dtype) if value.is_floating_point() else value for name, value in told.items()}
        optional = {"encoder_attention_mask"}
        if missing := [key for key, name in self.takes.items() if name not in told and key not in optional]:
            raise ValueError(f"{self.kind} is told by `{missing[0]}` what a sample is of, and the batch has none")
        if "text_embeds" in told:
            height, width = (8 * size for size in self.shape[1:])  # in pixels: uncropped, as large as it is drawn
            ids = torch.tensor([height, width, 0, 0, height, width], device=x.device, dtype=dtype)
            told["added_cond_kwargs"] = {"text_embeds": told.pop("text_embeds"), "time_ids": ids.expand(len(x), -1)}
        if self.kind == "PixArtTransformer2DModel":
            told["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        if guidance is not None:
            told["timestep_cond"] = _waves(guidance, self.net.config["time_cond_proj_dim"]).to(dtype)
        return self.net(x.to(dtype), timestep=time, return_dict=False, **told)[0][:, : self.channels]

    def unconditional(self, condition: Condition) -> Condition:
        """Return the condition without its labels and text. Raises ValueError where nothing is known to stand for none.

        A condition that the network is not told of is left as it is. A mask of text then covers all of the stored one.
        """
        return dict(condition) | {key: self._none(key, condition[key]) for key in self.takes if key in condition}

    def _none(self, key: str, like: Tensor) -> Tensor:
        if key == "labels":
            if self.null_class is None:
                raise ValueError(f"{self.kind} does not say which class stands for none: give `null_class`")
            return torch.full_like(like, self.null_class)
        if key in self.stored:
            stored = getattr(self, f"null_{key}")
            if stored.shape != like.shape[1:]:
                given, wanted = list(stored.shape), list(like.shape[1:])
                raise ValueError(f"null_condition: `{key}` is of shape {given}, and the data's are of {wanted}")
            return stored.to(like).expand(like.shape)
        if key == "encoder_attention_mask":
            return like if self.zeros else torch.ones_like(like)
        if not self.zeros:
            raise ValueError(f"{self.kind}: no `{key}` is known that stands for no text: give `null_condition`")
        return torch.zeros_like(like)

    def blank(self) -> Condition | None:
        """Return a condition of one sample, whatever it says, for those who only ask for shapes; None may be one."""
        config, device = self.net.config, self.net.device
        wide = [config.get(key) for key in ("caption_channels", "joint_attention_dim", "cross_attention_dim")]
        blank: Condition = {}
        if "labels" in self.takes:
            blank["labels"] = torch.zeros(1, dtype=torch.int64, device=device)
        if "encoder_hidden_states" in self.takes:
            blank["encoder_hidden_states"] = torch.zeros(1, 1, next(filter(None, wide)), device=device)
        if "pooled_projections" in self.takes:
            width = config.get("pooled_projection_dim")
            if width is None:  # SDXL's, which are joined with its six numbers
                width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            blank["pooled_projections"] = torch.zeros(1, width, device=device)
        return blank or None

    def with_guidance(self) -> "DiffusersDenoiser":
        """Return a copy that takes a guidance scale, by LCM's projection of it, which starts at zero.

        Raises ValueError for a network other than UNet2DConditionModel.
        """
        if self.kind != "UNet2DConditionModel":
            raise ValueError(f"{self.kind} cannot be given a guidance scale as an input")
        net = type(self.net).from_config(self.net.config, time_cond_proj_dim=256)
        net.load_state_dict(self.net.state_dict(), strict=False)
        nn.init.zeros_(net.time_embedding.cond_proj.weight)
        return DiffusersDenoiser(net.to(self.net.device, self.net.dtype), self.scheduler, **self._options())

    def _options(self) -> dict[str, Any]:
        stored = {key: getattr(self, f"null_{key}").cpu().contiguous() for key in self.stored}
        null = "zeros" if self.zeros else stored or None
        return {"sample_size": self.shape[1], "null_class": self.null_class, "null_condition": null}

    def configuration(self) -> dict[str, Any]:
        null = "zeros" if self.zeros else NULL if self.stored else None
        return {"kind": "diffusers", **self._options(), "null_condition": null}

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a folder that diffusers opens, as the network and as its scheduler, and `load_denoiser` too."""
        from huggingface_hub import save_torch_state_dict

        self.write_configuration(folder)
        self.net.save_config(folder)
        self.scheduler.save_config(folder)
        weights = {f"net.{k}": v for k, v in self.net.state_dict().items()} if state_dict is None else state_dict
        save_torch_state_dict(
            {key.removeprefix("net."): value for key, value in weights.items()},
            folder,
            filename_pattern=STEM + "{suffix}.safetensors",
            max_shard_size="10GB",
        )
        if self.stored:
            save_file(self._options()["null_condition"], Path(folder) / NULL)

    def load_weights(self, folder: Path) -> None:
        weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob(f"{STEM}*.safetensors")):
            weights |= load_file(path)
        self.net.load_state_dict(weights)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Compute activations again in the backward pass instead of keeping them."""
        self.net.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable


def check_kind(kind: str) -> None:
    """Raise ValueError for a network that is not known here."""
    if kind not in TAKES:
        raise ValueError(f"{kind} is no network that is known here. One of: {', '.join(sorted(TAKES))}")


def _taken(key: str, net: Any) -> bool:
    """Say whether a network that may take a key of the condition was built to."""
    config = net.config
    if type(net).__name__ == "DiTTransformer2DModel":
        return True
    if key == "labels":
        return config["num_class_embeds"] is not None or config["class_embed_type"] is not None
    if key == "pooled_projections" and "addition_embed_type" in config:
        return config["addition_embed_type"] == "text_time"
    return True


def _waves(scale: Tensor, width: int) -> Tensor:
    """Return an LCM's embedding of the guidance scale w of `c + w (c - 0)`."""
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(scale * 1000, width, downscale_freq_shift=1)
