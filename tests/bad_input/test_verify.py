"""The check of the result: a wrong network is never returned."""

import torch
from refusals import X, compile_refused, conv, net
from torch import nn

import fxprune
from fxprune import VerifyError


def test_a_wrong_cut_is_never_returned(monkeypatch):
    from fxprune import surgery

    honest = surgery.cut_tensor

    def reversed_rows(t, slices, *rest):
        slices = tuple(slices)
        out = honest(t, slices, *rest)
        return out.flip(0) if any(s.dim == 0 for s in slices) else out

    monkeypatch.setattr(surgery, "cut_tensor", reversed_rows)
    model = net()
    compile_refused(model, VerifyError, "differs from the masked original", "nothing is returned")
    assert fxprune.compile(model, X, verify=False, progress=False).plan.slices


def test_a_crash_of_the_result_is_an_error_of_ours(monkeypatch):
    from fxprune import surgery

    honest = surgery.cut_tensor
    monkeypatch.setattr(
        surgery, "cut_tensor", lambda t, s, *rest: honest(t, [c for c in s if c.dim == 0], *rest)
    )
    compile_refused(net(), VerifyError, "pruned network")


def test_an_output_that_is_not_finite_says_so():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            return self.b(self.a(x)).abs().neg().log()

    compile_refused(Log(), VerifyError, "NaN or infinity", "verify=False")
    assert fxprune.compile(Log(), X, verify=False, progress=False).plan.slices


def test_a_head_of_zeros_is_no_proof():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    pruned = fxprune.compile(net, torch.randn(1, 3, 6, 6), progress=False)
    assert "nothing was compared" in pruned.report.verified
