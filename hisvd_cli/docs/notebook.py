"""A tour of the Python API on the model inside hisvd; cells start with ``# %%``.

Editors run it cell by cell, ``jupytext --to ipynb`` makes a notebook of it, and a test runs it. It
writes into the current folder.
"""

# %% [markdown]
# # Compress a model in five calls
# `demo` is a small model inside hisvd. Any Hub id or folder works in its place.

# %%
import hisvd_cli as hisvd

# %% [markdown]
# Collect activation statistics, once per model and text. They are kept in the cache of hisvd.

# %%
calibration = hisvd.calibrate("demo", dataset="demo", samples=16, seqlen=128)
calibration

# %% [markdown]
# Choose ranks. A plan takes seconds, so compare several before anything is factored.

# %%
plans = [hisvd.plan(calibration, ratio=ratio, preset="best") for ratio in (0.8, 0.6)]
plan = plans[-1]
plan

# %%
[(each.ratio, each.data.predicted_loss) for each in plans]

# %% [markdown]
# Factor the layers and write a checkpoint. `evaluate=False` skips the measurement that `compress`
# makes of the demo model by itself.

# %%
checkpoint = hisvd.compress(plan, output="demo-0.6", evaluate=False)
checkpoint

# %% [markdown]
# Measure it beside the model that it was made from.

# %%
evaluation = hisvd.evaluate(checkpoint, baseline=calibration.model, windows=4)
evaluation

# %%
audit = hisvd.inspect(checkpoint)
assert not audit.problems
audit

# %% [markdown]
# Load it: an ordinary transformers model.

# %%
from transformers import AutoTokenizer

model = checkpoint.load(device="cpu")
tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
tokens = tokenizer("The", return_tensors="pt")
made = model.generate(**tokens, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
tokenizer.decode(made[0])

# %% [markdown]
# Other forms: one file, or a dense model for programs that know no factors.

# %%
dense = hisvd.convert(checkpoint, to="dense", output="demo-0.6-dense")
dense
