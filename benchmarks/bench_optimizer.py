"""One step of AdamW over 30 million parameters, against torch's fused one.

Work counts what must be moved: parameter, gradient and both moments are read, and all but the gradient written, 28
bytes a parameter.
"""
import numpy as np

from benchmarks.harness import Suite, normal, torch
from numformer import Tensor
from numformer.train import AdamW

# the arrays of a GPT with d 512, 8 layers and a vocabulary of 10 000, and two norms a layer
SHAPES = [(10000, 512)] + 8 * [(1536, 512), (512, 512), (2730, 512), (512, 1365), (512,), (512,)]


def main():
    suite = Suite("optimizer")
    params = [Tensor(normal(*shape), requires_grad=True) for shape in SHAPES]
    for p in params:
        p.grad = normal(*p.shape)
    count = sum(p.size for p in params)
    optimizer = AdamW(params, 1e-4)
    theirs = None
    if torch is not None:
        leaves = [torch.from_numpy(p.data.copy()).requires_grad_() for p in params]
        for leaf, p in zip(leaves, params, strict=True):
            leaf.grad = torch.from_numpy(p.grad.copy())
        theirs = torch.optim.AdamW(leaves, 1e-4, betas=(0.9, 0.98), weight_decay=0.1, fused=True).step
    suite.compare(f"AdamW, {count / 1e6:.0f} M parameters in {len(params)} arrays", 28 * count, "copy",
                  goal="1.0x torch, 80 % of copy", numformer=optimizer.step, torch=theirs)
    suite.compare("the same, clipped by its global norm", 28 * count + 4 * count, "copy",
                  numformer=lambda: optimizer.step(1.0), torch=theirs and clipped(leaves, theirs))
    assert all(np.isfinite(p.data).all() for p in params)
    suite.finish()


def clipped(leaves, step):
    def run():
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        step()
    return run


if __name__ == "__main__":
    main()
