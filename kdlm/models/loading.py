"""Where a model comes from: a hub id or folder, the sandbox, or a fresh config."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from pydantic import Field

from kdlm import deepspeed
from kdlm.models.adapters import Lora
from kdlm.models.fake_quantised import QuantizationAware
from kdlm.sandbox import SandboxModel
from kdlm.section import Section
from kdlm.section_loader import suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Loading(Section):
    """How weights are opened."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; `auto` takes the checkpoint's own. Train in float32 or bfloat16."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Attention implementation; `auto` leaves the choice to transformers (sdpa where the model has it)."""
    quantization: Literal["none", "4bit", "8bit"] = "none"
    """Quantise while loading, with bitsandbytes: 4bit is nf4 with double quantisation."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Off unless you have read that code."""

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for `from_pretrained`. Raises ValueError when a needed package is missing."""
        from transformers import BitsAndBytesConfig
        from transformers.utils.import_utils import is_bitsandbytes_available, is_flash_attn_2_available

        options: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        if self.attention != "auto":
            if self.attention == "flash_attention_2" and not is_flash_attn_2_available():
                raise ValueError("attention: flash_attention_2 needs flash-attn, which is not installed: use sdpa")
            options["attn_implementation"] = self.attention
        if self.quantization != "none":
            if not is_bitsandbytes_available():
                raise ValueError(f"quantization: {self.quantization} needs bitsandbytes: pip install 'kdlm[quant]'")
            options["quantization_config"] = (
                BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype),
                )
                if self.quantization == "4bit"
                else BitsAndBytesConfig(load_in_8bit=True)
            )
        return options


class Pretrained(Loading):
    """A checkpoint: hub id or local folder."""

    name: Literal["pretrained"] = "pretrained"
    path: str
    """Hub id (`Qwen/Qwen3-0.6B`) or local folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    def location(self) -> str:
        return self.path

    def load(self, **extra: Any) -> "PreTrainedModel":
        """Open the weights. Raises ValueError naming the path when there is no such model."""
        from transformers import AutoModelForCausalLM

        from kdlm.models.adaptive_student import adaptive_class

        options = {"revision": self.revision, **self.options(), **extra}
        model = open_pretrained(AutoModelForCausalLM, self.location(), **options)
        if getattr(model.config, "adaptive", None) is None:
            return model
        return open_pretrained(adaptive_class(type(model)), self.location(), **options)  # its gates too

    def config(self) -> Any:
        """Open only the configuration: sizes, without weights."""
        from transformers import AutoConfig

        code = self.trust_remote_code
        return open_pretrained(AutoConfig, self.location(), revision=self.revision, trust_remote_code=code)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Open the tokenizer that belongs to the weights."""
        from transformers import AutoTokenizer

        code = self.trust_remote_code
        return open_pretrained(AutoTokenizer, self.location(), revision=self.revision, trust_remote_code=code)

    def describe(self) -> str:
        """Return the name a reader knows this model by."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"


class Sandbox(SandboxModel, Loading):
    """A model that kdlm builds on this machine, in minutes, without a hub."""

    def _opened(self) -> Pretrained:
        loading = {key: getattr(self, key) for key in Loading.model_fields}
        return Pretrained(path=str(self.resolve()), **loading)

    def location(self) -> str:
        return str(self.resolve())

    def load(self, **extra: Any) -> "PreTrainedModel":
        return self._opened().load(**extra)

    def config(self) -> Any:
        return self._opened().config()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self._opened().tokenizer()

    def describe(self) -> str:
        return f"sandbox:{self.model}"


AnySource = Annotated[Pretrained | Sandbox, Field(discriminator="name")]


LEFT_OUT = frozenset({"README.md", ".gitattributes", "training_args.bin"})
"""Files beside a model's weights that say nothing to it."""


def telling_files(folder: Path) -> list[Path]:
    """Return the files of a model's folder that tell it from another, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in LEFT_OUT)


def named(given: str, **options: Any) -> Pretrained | Sandbox:
    """Return what a word of the command line names: a hub id, a folder, or `sandbox:code-teacher`.

    `options` are those of `Loading`. Raises ValueError for a sandbox model that there is not, or a wrong option.
    """
    if not given.startswith("sandbox:"):
        return Pretrained(path=given, **options)
    name, names = given.removeprefix("sandbox:"), get_args(Sandbox.model_fields["model"].annotation)
    if name not in names:
        raise ValueError(
            f"the sandbox has no model {name!r}{suggestion(name, names) or '.'} One of: {', '.join(names)}"
        )
    return Sandbox.model_validate({"model": name, **options})


class StudentOptions(Section):
    """What can be asked of any student."""

    lora: Lora | None = None
    """Train adapters instead of all weights."""
    quantization_aware: QuantizationAware | None = None
    """Train all weights as they will be after rounding to a few bits."""
    router_balance: float | None = Field(None, gt=0)
    """Weight of a balance loss of the routers beside the method's losses, where the student is a mixture of experts: on
    the scale of its own `router_aux_loss_coef` (0.01, 0.001), which nothing else here adds."""


class Sliced(Section):
    """What opens a model may slice it over ranks."""

    tensor_parallel: bool = False
    """Slice every layer and the head over all ranks, which then read the same rows, by transformers' own plan for the
    architecture. For models too wide for one GPU; see docs/sharding.md."""

    def load(self, **extra: Any) -> "PreTrainedModel":
        """Open the weights, on each rank its slices. Raises ValueError where one process is all there is."""
        opened: Any = super()
        if not self.tensor_parallel:
            return opened.load(**extra)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks == 1:
            raise ValueError("tensor_parallel: slices are for several ranks, and this is one process: leave it out")
        if getattr(self, "quantization", "none") != "none":
            raise ValueError("tensor_parallel: slices are of plain weights: leave quantization out")
        from transformers.distributed import DistributedConfig

        return opened.load(distributed_config=DistributedConfig(tp_size=ranks), **extra)


class PretrainedStudent(Sliced, Pretrained, StudentOptions):
    """A checkpoint to train further: hub id or local folder."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Data type of the trained weights; float32 with `training.bf16` is the safe pair. `auto`: the checkpoint's own."""


class SandboxStudent(Sliced, Sandbox, StudentOptions):
    """A student architecture that kdlm builds on this machine."""


class Fresh(StudentOptions):
    """A student with random weights, from a configuration."""

    name: Literal["fresh"] = "fresh"
    config_from: str
    """Hub id, folder or `sandbox:code-student`, whose configuration gives the architecture."""
    sizes: dict[str, Any] = {}
    """Configuration values to change, e.g. {num_hidden_layers: 4, hidden_size: 256}."""
    tokenizer_from: str | None = None
    """Where the tokenizer is, said likewise; by default `config_from`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the weights."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation."""
    seed: int = 0
    """Seed of the random weights."""

    def config(self) -> Any:
        config = named(self.config_from).config()
        if unknown := [key for key in self.sizes if not hasattr(config, key)]:
            raise ValueError(f"student.sizes: {type(config).__name__} has no {', '.join(unknown)}")
        for key, value in self.sizes.items():
            setattr(config, key, value)
        if (types := getattr(config, "layer_types", None)) is not None:
            config.layer_types = (types * config.num_hidden_layers)[: config.num_hidden_layers]
        return config

    def load(self) -> "PreTrainedModel":
        from transformers import AutoModelForCausalLM

        extra = {} if self.attention == "auto" else {"attn_implementation": self.attention}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return AutoModelForCausalLM.from_config(self.config(), dtype=getattr(torch, self.dtype), **extra)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return named(self.tokenizer_from or self.config_from).tokenizer()

    def describe(self) -> str:
        return f"fresh {self.config_from} {self.sizes or ''}".strip()


def open_pretrained(auto: Any, path: str, **options: Any) -> Any:
    """Call `auto.from_pretrained`, and say in one line what is wrong with `path` when it fails."""
    if path.startswith("stage:"):
        raise ValueError(f"{path}: names what a stage leaves, and this is one recipe: run the file with `stages`")
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ValueError(f"{path}: no such model folder{_left_by_a_run(Path(path))}")
    local = Path(path).expanduser()
    try:
        with deepspeed.loading_whole():
            opened = auto.from_pretrained(str(local) if local.is_dir() else path, **options)
        return _as_it_trains(opened)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: cannot open this model ({auto.__name__}): {reason}") from error


def _as_it_trains(opened: Any) -> Any:
    """Keep 4-bit layers from the product that bitsandbytes has for evaluation on a CPU; return what was opened.

    It computes in bfloat16, packs the weights anew with their scales rounded again, so that each evaluation changes
    what is trained on afterwards, and fails where the inputs are no multiple of 64 (0.50.2).
    """
    for module in opened.modules() if getattr(opened, "is_loaded_in_4bit", False) else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return opened


def _left_by_a_run(path: Path) -> str:
    """Return what to run where a model is missing that looks like a run's student, else nothing."""
    if path.name != "student":
        return ""
    if (path.expanduser().parent / "recipe.yaml").is_file():
        return f"; the run in {path.parent} has not ended: kdlm train {path.parent}/recipe.yaml --resume"
    return f"; train the recipe with run_dir: {path.parent} first"


def device_of(name: str) -> torch.device:
    """Return the device that `--device` names; `auto` is a GPU where there is one. Raises ValueError without it."""
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return place
