"""Normalized LSTMs as they are usually written in PyTorch: a cell in a loop, for the compiler to make fast.

After pytorch's benchmarks/fastrnns/custom_lstms.py and, for statistics per time step, Cooijmans et al. 2016
(arXiv 1603.09025). Norms stand where those of `normlab.LSTM` do, and the input is projected once for all time steps.
One layer, one direction, training only.

Shape suffixes: B batch, T time, I input features, H hidden, G gates (4H), S features of all sites (4H + 4H + H).
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normlab

NORMS = ("ln", "bn_step")
Compiler = Literal["jit", "compile"]


class LayerNormCell(nn.Module):
    """One time step; `mean_S` and `var_S` are not used."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.input_gain = nn.Parameter(torch.ones(4 * hidden))
        self.hidden_gain = nn.Parameter(torch.ones(4 * hidden))
        self.cell_gain = nn.Parameter(torch.ones(hidden))
        self.cell_bias = nn.Parameter(torch.zeros(hidden))
        self.weight_GH = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias_G = nn.Parameter(torch.empty(4 * hidden))

    def forward(
        self, projected_BG: Tensor, h_BH: Tensor, c_BH: Tensor, mean_S: Tensor, var_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        gates, hidden = self.bias_G.shape[0], c_BH.shape[1]
        from_input = F.layer_norm(projected_BG, (gates,), self.input_gain)
        from_hidden = F.layer_norm(F.linear(h_BH, self.weight_GH), (gates,), self.hidden_gain)
        i, f, g, o = (from_input + from_hidden + self.bias_G).chunk(4, 1)
        c_BH = torch.sigmoid(f) * c_BH + torch.sigmoid(i) * torch.tanh(g)
        normalized_BH = F.layer_norm(c_BH, (hidden,), self.cell_gain, self.cell_bias)
        return torch.sigmoid(o) * torch.tanh(normalized_BH), c_BH


class StepBatchNormCell(LayerNormCell):
    """One time step, whose stored statistics are `mean_S` and `var_S`: changed in place."""

    def forward(
        self, projected_BG: Tensor, h_BH: Tensor, c_BH: Tensor, mean_S: Tensor, var_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        gates = self.bias_G.shape[0]
        mean, var = mean_S.split([gates, gates, gates // 4]), var_S.split([gates, gates, gates // 4])
        from_input = F.batch_norm(projected_BG, mean[0], var[0], self.input_gain, training=True)
        from_hidden = F.batch_norm(F.linear(h_BH, self.weight_GH), mean[1], var[1], self.hidden_gain, training=True)
        i, f, g, o = (from_input + from_hidden + self.bias_G).chunk(4, 1)
        c_BH = torch.sigmoid(f) * c_BH + torch.sigmoid(i) * torch.tanh(g)
        normalized_BH = F.batch_norm(c_BH, mean[2], var[2], self.cell_gain, self.cell_bias, training=True)
        return torch.sigmoid(o) * torch.tanh(normalized_BH), c_BH


class Loop(nn.Module):
    """A cell over the sequence, with stored statistics for each time step."""

    def __init__(self, cell: nn.Module, inputs: int, hidden: int, length: int) -> None:
        super().__init__()
        self.cell = cell
        self.weight_GI = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.register_buffer("mean_TS", torch.zeros(length, 9 * hidden))
        self.register_buffer("var_TS", torch.ones(length, 9 * hidden))

    def forward(self, x_TBI: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        projected = F.linear(x_TBI, self.weight_GI).unbind(0)
        # torch.jit knows the class of buffers, and wants no annotation.
        means, variances = self.mean_TS.unbind(0), self.var_TS.unbind(0)  # pyright: ignore[reportCallIssue]
        h = torch.zeros(x_TBI.shape[1], self.weight_GI.shape[0] // 4, dtype=x_TBI.dtype, device=x_TBI.device)
        c = h
        outputs: list[Tensor] = []
        for t in range(len(projected)):
            h, c = self.cell(projected[t], h, c, means[t], variances[t])
            outputs += [h]
        return torch.stack(outputs), (h, c)


def peer(lstm: normlab.LSTM, norm: str, length: int, compiler: Compiler) -> nn.Module:
    """The loop with the parameters of `lstm` (one layer, every site `norm`) for sequences of `length`.

    Args:
        norm: "ln" or "bn_step".
        compiler: "jit" scripts loop and cell with torch.jit, "compile" compiles the cell with torch.compile.
    """
    cell = {"ln": LayerNormCell, "bn_step": StepBatchNormCell}[norm](lstm.hidden_size)
    loop = Loop(cell, lstm.input_size, lstm.hidden_size, length)
    values = dict(lstm.named_parameters())
    loop.to(values["weight_ih_l0"])  # its device and precision
    with torch.no_grad():
        loop.weight_GI.copy_(values["weight_ih_l0"])
        cell.weight_GH.copy_(values["weight_hh_l0"])
        cell.bias_G.copy_(values["bias_ih_l0"] + values["bias_hh_l0"])
        cell.input_gain.copy_(values["norms.l0.input_to_hidden.weight"])
        cell.hidden_gain.copy_(values["norms.l0.hidden_to_hidden.weight"])
        cell.cell_gain.copy_(values["norms.l0.cell.weight"])
        cell.cell_bias.copy_(values["norms.l0.cell.bias"])
    if compiler == "jit":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # people still use it
            return torch.jit.script(loop)
    cell.compile(dynamic=False)
    return loop
