"""Write docs/attention.ipynb, run: ``python docs/make_notebook.py``.

Needs nbformat, nbclient, ipykernel, matplotlib and torch.
"""
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NOTEBOOK = HERE / "attention.ipynb"

# Cells are parted by lines of "# %%"; those of text are marked and commented out.
CELLS = r'''
# %% text
# # Attention without the square
#
# `softmax(scale Q Kᵀ) V` has a matrix of S × S in the middle. Nothing needs it whole: a softmax can be made while the
# keys go by, with two
# numbers a row, its maximum so far `m` and the sum of exponentials so far `l`. Here that is drawn, in NumPy and with
# numformer.
# %%
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import numformer as nf
from numformer.nn import attention_maps

plt.rcParams.update({"figure.dpi": 72, "savefig.dpi": 72, "font.size": 9, "image.cmap": "Blues"})
rng = np.random.default_rng(0)
# %% text
# ## The algorithm
#
# One block of queries meets the keys a chunk at a time. What is already summed was weighted against an older maximum:
# it decays by
# `exp(m_old - m_new)`. In the kernels a chunk is a tile of registers and cache, and its product with V follows while
# it is still there.
# %%
def attention(q, k, v, chunk=16):
    """(S, D) each, causal; never more than S x chunk scores."""
    S, scale = len(q), q.shape[1] ** -0.5
    m, l, o = np.full(S, -np.inf), np.zeros(S), np.zeros((S, v.shape[1]))
    for j in range(0, S, chunk):
        s = scale * q @ k[j:j + chunk].T
        s[np.arange(S)[:, None] < j + np.arange(s.shape[1])] = -np.inf      # a later key
        m_new = np.maximum(m, s.max(1))
        p = np.exp(s - m_new[:, None])
        decay = np.exp(m - m_new)
        l, o, m = l * decay + p.sum(1), o * decay[:, None] + p @ v[j:j + chunk], m_new
    return o / l[:, None], m + np.log(l)


q, k, v = rng.standard_normal((3, 100, 16))
out, lse = attention(q, k, v)
ours, our_lse = nf.scaled_dot_product_attention(*(x[None, None] for x in (q, k, v)), is_causal=True, return_lse=True)
print("largest difference:", f"{max(abs(out - ours[0, 0]).max(), abs(lse - our_lse[0, 0]).max()):.0e}")
# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
n = 8
for ax, window in zip(axes, (n, 2)):
    for i in range(n):
        for j in range(n):
            seen = i - window <= j <= i
            edge = seen and (j == i or j == i - window)
            color = "#c6dbef" if edge else "#6baed6" if seen else "white"
            ax.add_patch(plt.Rectangle((j, i), 1, 1, fc=color, ec="0.6"))
            if seen:
                ax.text(j + 0.5, i + 0.5, "mask" if edge else "whole", ha="center", va="center", fontsize=7)
    ax.set(xlim=(0, n), ylim=(n, 0), xticks=[], yticks=[], xlabel="chunks of keys  →  m, l, o move on",
           ylabel="blocks of queries", title="causal" if window == n else "causal, with a window")
    ax.set_aspect("equal")
fig.suptitle("White tiles are never touched; only edge tiles look at single scores")
fig.tight_layout()
plt.show()
# %% text
# Going back, each weight is made again from `lse`: `p = exp(s - lse)`. With `delta = sum(dO * O)` a row,
# `dV = Pᵀ dO`, `dS = P * (dO Vᵀ - delta)`, `dQ = scale dS K`, `dK = scale dSᵀ Q`, tile by tile as well.
#
# ## Where the diagonal lies
#
# With fewer queries than keys there are two meanings of "causal". Ours is FlashAttention's, the last query sees every
# key;
# `causal_align="top_left"` is PyTorch's.
# %%
fig, axes = plt.subplots(1, 4, figsize=(9, 2.4))
cases = [(*shape, align) for shape in ((2, 5), (5, 2)) for align in ("bottom_right", "top_left")]
for ax, (Sq, Sk, align) in zip(axes, cases):
    q, k = np.zeros((1, 1, Sq, 4)), np.zeros((1, 1, Sk, 4))
    w = attention_maps(q, k, is_causal=True, causal_align=align)[0, 0]
    ax.imshow(w > 0, vmin=0, vmax=1.6)
    for i, j in np.ndindex(Sq, Sk):
        ax.text(j, i, int(w[i, j] > 0), ha="center", va="center")
    ax.set(title=f"Sq {Sq}, Sk {Sk}\n{align}", xticks=[], yticks=[])
fig.tight_layout()
plt.show()
# %% text
# ## ALiBi and windows
#
# ALiBi subtracts `slope * distance` from a score, with a slope for each head: some heads look near, some far. A
# window cuts. Below, what is
# left of equal scores (`attention_maps` gives the weights of the heads and rows that one asks for).
# %%
S, H = 64, 8
zero = np.zeros((1, H, S, 4))
slopes = nf.alibi_slopes(H)
fig, axes = plt.subplots(1, 4, figsize=(9, 2.6))
pictures = [("ALiBi, head 0", {"alibi_slopes": slopes, "heads": 0}),
            ("ALiBi, head 3", {"alibi_slopes": slopes, "heads": 3}),
            ("window (15, 0)", {"window_size": (15, 0), "heads": 0}),
            ("both, with a sink", {"window_size": (15, 0), "alibi_slopes": slopes, "sinks": np.zeros(H), "heads": 3})]
for ax, (title, keywords) in zip(axes, pictures):
    w = attention_maps(zero, zero, is_causal=True, **keywords)[0, 0]
    ax.imshow(w ** 0.5)
    ax.set(title=title, xticks=[], yticks=[])
axes[0].set_ylabel("query")
fig.tight_layout()
plt.show()
# %% text
# ## Memory
#
# Forward and backward of one head of 64, causal with ALiBi and dropout, each in a process of its own: peak resident
# size above that of the inputs.
# PyTorch takes ALiBi as a mask of S × S, and drops weights from a matrix of that size too.
# %%
PROGRAM = """
import re, sys
from pathlib import Path
import numpy as np
S, who = int(sys.argv[1]), sys.argv[2]
resident = lambda name: int(re.search(name + ":[^0-9]+([0-9]+)", Path("/proc/self/status").read_text())[1]) / 1024
rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 1, 1, S, 64), np.float32)
if who == "numformer":
    import numformer as nf
    def run(n):
        x = [nf.Tensor(a[:, :, :n], requires_grad=True) for a in (q, k, v)]
        features = {"alibi_slopes": nf.alibi_slopes(1), "dropout_p": 0.1, "rng": rng}
        nf.scaled_dot_product_attention(*x, is_causal=True, **features).sum().backward()
else:
    import torch
    def run(n):
        x = [torch.from_numpy(a[:, :, :n]).requires_grad_() for a in (q, k, v)]
        at = torch.arange(n)
        bias = -(at[:, None] - at).float() * 2.0 ** -8
        bias.masked_fill_(at > at[:, None], -torch.inf)
        torch.nn.functional.scaled_dot_product_attention(*x, attn_mask=bias, dropout_p=0.1).sum().backward()
run(64)
Path("/proc/self/clear_refs").write_text("5")       # the peak counts from here
before = resident("VmRSS")
run(S)
print(resident("VmHWM") - before)
"""
lengths = [1024, 2048, 4096, 8192]


def measured(n, who):
    """MB that a process of its own needs for it."""
    command = [sys.executable, "-c", PROGRAM, str(n), who]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


used = {who: [measured(n, who) for n in lengths] for who in ("numformer", "torch")}
for who, amounts in used.items():
    print(f"{who:10}", "".join(f"{n:>8}: {amount:7.1f} MB" for n, amount in zip(lengths, amounts)))
# %%
fig, ax = plt.subplots(figsize=(5, 3))
for who, amounts in used.items():
    ax.loglog(lengths, np.maximum(amounts, 0.5), "o-", label=who)
ax.set(xlabel="S", ylabel="MB above the inputs", xticks=lengths, xticklabels=lengths)
ax.legend()
fig.tight_layout()
plt.show()
# %% text
# ## Speed
#
# The table of the README, of `make bench BENCH=attention`:
# %%
readme = Path("../README.md").read_text()
table = readme[readme.index("| work |"):]
print(table[:table.index("| **gelu**")])
'''


def cells():
    """The notebook's, in turn."""
    for kind, body in re.findall(r"^# %%( text)?\n(.*?)(?=^# %%|\Z)", CELLS, re.MULTILINE | re.DOTALL):
        if kind:
            yield nbformat.v4.new_markdown_cell(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        else:
            yield nbformat.v4.new_code_cell(body.strip())


def main():
    notebook = nbformat.v4.new_notebook(cells=list(cells()), metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(HERE)}},
                   record_timing=False).execute()
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
