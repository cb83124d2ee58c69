"""What every architecture needs; imported once, in the process that the others are forked from."""

from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # noqa: F401

import tests.architectures.checks
import tests.preload  # noqa: F401

logging.set_verbosity_error()
logging.disable_progress_bar()
