"""Importing this module lets transformers' ``from_pretrained`` read packed files (hub/packed.py).

transformers finds :class:`PackedQuantizer` by ``quant_method`` in config.json. The model that comes out is an ordinary
dense one: the weights are expanded as they are read, and neither model nor config remembers the packing.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, apply_renamings
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import LoadError
from .packed import METHOD, PACKED_FILE, SUFFIXES, check_packed, unpack_tensor


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed checkpoint. What config.json says besides the method is ignored."""

    def __init__(self, **ignored: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers has an enum of its own methods
        self.dequantize = True  # transformers then takes the configuration off the model after loading


class Unpack(ConversionOps):
    """The parts of one packed weight, by suffix → the weight by its name in the model."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **names: Any
    ) -> dict[str, list[Tensor]]:
        name = names["full_layer_name"]
        parts = {suffix: part[0] if isinstance(part, list) else part for suffix, part in input_dict.items()}
        return {name: [unpack_tensor(name, parts)]}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Points transformers to the packed file, checks it, and expands its weights."""

    def update_attn_implementation(self, config: Any) -> Any:
        # The one hook that sees the config before the file is looked for. config.json must not name the file itself:
        # without this package transformers would then read it, and leave every packed weight at random.
        config.transformers_weights = PACKED_FILE
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        # Before loading, because transformers turns errors of single weights into a report.
        files = [Path(file) for file in checkpoint_files or [] if Path(file).name == PACKED_FILE]
        self.packed = [name for file in files for name in check_packed(file)]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        renamings = [each for each in weight_conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in weight_conversions if isinstance(each, WeightConverter)]
        for name in self.packed:
            renamed = apply_renamings(name, renamings)
            if any(converter.compiled_sources.search(renamed) for converter in converters):
                raise LoadError(
                    f"transformers merges or splits {name} while it reads it, which packed weights do not support.",
                    "Use `snows-hf unpack` first.",
                )
        self.others = weight_conversions
        return [*weight_conversions, WeightConverter(list(SUFFIXES), "", [Unpack()], force_cpu=True)]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        # What is saved from here on is an ordinary checkpoint.
        # (transformers 5.24 has taken all conversions off by now, which saving needs, where names have changed.)
        model._weight_conversions = [conversion for conversion in self.others if conversion.was_used()]
        model.config.__dict__.pop("transformers_weights", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
