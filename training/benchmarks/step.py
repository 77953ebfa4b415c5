"""One optimizer step of MAE3D against the same network of MONAI and of timm's blocks.

    python training/benchmarks/step.py

ViT-B/16 on 96-cubed crops, three quarters hidden, decoder 384 wide and 4 deep, squared error on hidden voxels, clipped
gradients, AdamW. MONAI's `MaskedAutoEncoderViT` runs in fp32, the only precision it works in; the others in
`--precision`. Each is in a process of its own, which is set up as its users get it: `medmim-train pretrain` has the
allocator keep freed memory on a CPU, so MONAI's is measured with that too. Besides: the step's share of the rate of
plain matrix products measured in the same run, what the time goes to, and the peak memory of each.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import typer
from common import RESULTS, compare, median, take_turns, write_result
from monai.networks.nets import MaskedAutoEncoderViT
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.utils.flop_counter import FlopCounterMode

import medmim
from medmim.layers.position import sincos_position
from medmim.layers.tokens import patchify
from medmim.memory import keep_freed_memory
from medmim_training.methods.mae import MAE
from medmim_training.optimization import clip_gradients
from medmim_training.plan import matrix_product_rate
from medmim_training.precision import DTYPES, resolve_precision


@dataclass(frozen=True)
class Network:
    """Sizes of the network that all candidates build."""

    side: int = 96
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 384
    decoder_depth: int = 4
    decoder_heads: int = 6
    ratio: float = 0.75

    @property
    def encoder_args(self) -> dict[str, Any]:
        """Of `medmim.create_model`."""
        return {
            "img_size": [self.side] * 3,
            "patch_size": [self.patch] * 3,
            "embed_dim": self.width,
            "depth": self.depth,
            "num_heads": self.heads,
        }

    @property
    def decoder_args(self) -> dict[str, Any]:
        """Of `MAEDecoder`."""
        return {"embed_dim": self.decoder_width, "depth": self.decoder_depth, "num_heads": self.decoder_heads}


def main(
    batch: int = 4,
    precision: str = "auto",
    rounds: int = 5,
    out: Path = RESULTS / "step.json",
) -> None:
    """Measures, and writes the result to OUT."""
    measure(Network(), batch=batch, precision=precision, rounds=rounds, out=out)


def measure(network: Network, *, batch: int, precision: str, rounds: int, out: Path) -> None:
    """The benchmark, for a network of any size."""
    precision = resolve_precision(precision)
    rates: list[float] = []

    def matrices() -> None:
        rates.append(matrix_product_rate(precision, seconds=0.5))

    with ExitStack() as stack:
        steps = {
            name: stack.enter_context(OwnProcess(name, network, batch=batch, precision=precision))
            for name in CANDIDATES
        }
        times = take_turns({"matrices": matrices, **steps}, rounds=rounds)
        del times["matrices"]
        # Before the rest, which takes memory of its own.
        peaks = {name: step.ask("peak_megabytes") for name, step in steps.items()}
        weights = {name: step.ask("million_weights") for name, step in steps.items()}
        flops = steps["medmim"].ask("flops")
        time_goes_to = steps["medmim"].ask("time_goes_to")
    of_rate = [flops / seconds / rate for seconds, rate in zip(times["medmim"], rates[-rounds:], strict=True)]
    result = {
        "what": f"one optimizer step, batch {batch}, {network}",
        "precision": {name: "fp32" if name.startswith("monai") else precision for name in CANDIDATES},
        "million_weights": weights,
        **compare(times, "medmim"),
        "gflop": round(flops / 1e9, 1),
        "share_of_matrix_product_rate": median(of_rate),
        "matrix_product_gflops": round(max(rates) / 1e9, 1),
        "time_goes_to": time_goes_to,
        "peak_megabytes": peaks,
    }
    write_result(out, result)


class OwnProcess:
    """A candidate in a process of its own: a call makes one step there.

    Args:
        name: Of the candidate.
        network: What it builds.
        batch: Crops of a step.
        precision: As resolved.
    """

    def __init__(self, name: str, network: Network, *, batch: int, precision: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        args = theirs, name, network, batch, precision, torch.get_num_threads()
        self.process = context.Process(target=_serve, args=args, daemon=True)

    def __enter__(self) -> OwnProcess:
        self.process.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.join()

    def ask(self, what: str) -> Any:
        """What the process knows by that name, see `_serve`."""
        self.pipe.send(what)
        while not self.pipe.poll(1):
            if not self.process.is_alive():
                raise RuntimeError("the process of a candidate has ended; its error is above")
        return self.pipe.recv()

    def __call__(self) -> None:
        self.ask("step")


def _serve(pipe: Connection, name: str, network: Network, batch: int, precision: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if name in KEEP_MEMORY:
        keep_freed_memory()
    model, loss_of = CANDIDATES[name](network)
    step = make_step(name, model, loss_of, network, batch, precision)
    answers = {
        "step": step,
        "peak_megabytes": _peak,
        "million_weights": lambda: _trained(model) / 1e6,
        "flops": lambda: _flops(step),
        "time_goes_to": lambda: breakdown(step),
    }
    while True:
        answer = answers[pipe.recv()]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        pipe.send(answer)


# --- the candidates: each a function that makes one step -------------------------------------------------------------


Candidate = tuple[nn.Module, Callable[[Tensor], Tensor]]  # a model, and its loss of volumes (B, 1, D, H, W)


def make_step(
    name: str, model: nn.Module, loss_of: Callable[[Tensor], Tensor], network: Network, batch: int, precision: str
) -> Callable[[], None]:
    """What runs one step of a candidate, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    x = torch.rand(batch, 1, *[network.side] * 3, generator=torch.Generator().manual_seed(0)).to(device)
    # MONAI's is given the optimizer as it comes; ours is fused, and so timm's is.
    monai = name.startswith("monai")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=not monai)
    dtype = torch.float32 if monai else DTYPES[precision]
    clip = clip_gradients if name == "medmim" else torch.nn.utils.clip_grad_norm_

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = loss_of(x)
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _trained(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def of_medmim(network: Network) -> Candidate:
    encoder = medmim.create_model("vit_b_mae3d", **network.encoder_args)
    method = MAE(encoder, ratio=network.ratio, loss="mse", decoder=network.decoder_args)
    generator = torch.Generator().manual_seed(0)
    return method, lambda x: method({"x": x[:, None]}, generator).loss


def of_monai(network: Network) -> Candidate:
    model = MaskedAutoEncoderViT(
        in_channels=1,
        img_size=network.side,
        patch_size=network.patch,
        hidden_size=network.width,
        mlp_dim=4 * network.width,
        num_layers=network.depth,
        num_heads=network.heads,
        masking_ratio=network.ratio,
        decoder_hidden_size=network.decoder_width,
        decoder_mlp_dim=4 * network.decoder_width,
        decoder_num_layers=network.decoder_depth,
        decoder_num_heads=network.decoder_heads,
        qkv_bias=True,
    )

    def loss_of(x: Tensor) -> Tensor:
        predicted, hidden = model(x)  # (B, N, V), (B, N)
        error = (predicted - patchify(x, (network.patch,) * 3)).square().mean(dim=-1)
        return (error * hidden).sum() / hidden.sum()

    return model, loss_of


class TimmMAE(nn.Module):
    """The same network as one would assemble it from timm's blocks, after the released code of He et al. 2022."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, patch = network, network.patch
        grid = (network.side // patch,) * 3
        self.embed = nn.Conv3d(1, network.width, patch, patch)
        self.blocks = nn.ModuleList(Block(network.width, network.heads, qkv_bias=True) for _ in range(network.depth))
        self.norm = nn.LayerNorm(network.width)
        self.to_decoder = nn.Linear(network.width, network.decoder_width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, network.decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(network.decoder_width, network.decoder_heads, qkv_bias=True) for _ in range(network.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(network.decoder_width)
        self.to_voxels = nn.Linear(network.decoder_width, patch**3)
        self.register_buffer("position", sincos_position(grid, network.width))
        self.register_buffer("decoder_position", sincos_position(grid, network.decoder_width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT + self.position  # (B, N, C)
        B, N, C = tokens.shape
        kept = N - int(self.network.ratio * N)
        order = torch.rand(B, N, device=x.device).argsort(dim=1)
        tokens = tokens.gather(1, order[:, :kept, None].expand(-1, -1, C))
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.to_decoder(self.norm(tokens))
        tokens = torch.cat([tokens, self.hidden_token.expand(B, N - kept, -1).to(tokens.dtype)], dim=1)
        back = order.argsort(dim=1)[..., None].expand(-1, -1, tokens.shape[-1])
        tokens = tokens.gather(1, back) + self.decoder_position
        for block in self.decoder_blocks:
            tokens = block(tokens)
        predicted = self.to_voxels(self.decoder_norm(tokens)).float()  # (B, N, V)
        hidden = torch.ones(B, N, device=x.device).scatter(1, order[:, :kept], 0.0)
        error = (predicted - patchify(x, (self.network.patch,) * 3)).square().mean(dim=-1)
        return (error * hidden).sum() / hidden.sum()


def of_timm(network: Network) -> Candidate:
    model = TimmMAE(network)
    return model, model


CANDIDATES = {"medmim": of_medmim, "monai": of_monai, "monai, memory kept": of_monai, "timm": of_timm}
KEEP_MEMORY = {"medmim", "monai, memory kept"}


# --- what else is reported -------------------------------------------------------------------------------------------

KINDS = {
    "matrix products": ("mm", "addmm", "linear", "mkldnn_linear"),
    "attention": ("bmm", "flash", "efficient", "softmax", "scaled_dot"),  # no other layer multiplies in batches
    "normalisation": ("layer_norm",),
    "activation": ("gelu",),
    "optimizer and clipping": ("adamw", "norm", "foreach"),
    "casts and copies": ("copy_", "_to_copy", "cat", "clone"),
    "patches": ("index", "gather", "scatter"),
}


def breakdown(step: Callable[[], None]) -> dict[str, float]:
    """Shares of a step's time by kind of operator, the largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    return shares(profile.key_averages(), on_gpu=on_gpu)


def shares(events: Iterable[FunctionEventAvg], *, on_gpu: bool) -> dict[str, float]:
    """Shares of time by kind of operator, the largest first."""
    spent: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU:  # a GPU's own are kernels, whose time the operator above them has too
            spent[_kind(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: round(share / total, 3) for kind, share in spent.most_common()}


def _kind(operator: str) -> str:
    name = operator.removeprefix("aten::").lower()
    for kind, parts in KINDS.items():
        if any(name == part or (len(part) > 3 and part in name) for part in parts):
            return kind
    return "everything else"


def _flops(step: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _peak() -> int:
    """Megabytes at the peak of this process so far, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


if __name__ == "__main__":
    typer.run(main)
