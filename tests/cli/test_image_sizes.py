"""Images of another size than a model's configuration has, on the command line: run, or refused in one message."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
from cases import _TIMM_VIT, randomised, timm_swin, transformers_swin, transformers_vit
from embedded import DIGITS, VIT, copy_of, edit_config
from safetensors.torch import save_file
from torch import nn
from transformers import BeitConfig, BeitForImageClassification, Dinov2Config, Dinov2ForImageClassification
from transformers import ViTConfig, ViTForImageClassification
