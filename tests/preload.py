"""What every command imports sooner or later; no test imports this."""

import importlib
import pkgutil

import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import hisvd_cli

for _module in pkgutil.walk_packages(hisvd_cli.__path__, "hisvd_cli."):
    if not _module.name.startswith(("hisvd_cli.demo", "hisvd_cli.__main__")):
        importlib.import_module(_module.name)
