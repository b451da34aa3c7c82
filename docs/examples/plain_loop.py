"""A decoder and its training loop on steep.kernels alone: packed documents, no padding, no mask, no logits.

    python docs/examples/plain_loop.py                                    # seconds on a CPU
    python docs/examples/plain_loop.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16 --tokens 16384

The documents are arithmetic progressions, so the loss falls at once. Shape suffixes: T tokens of the packed batch,
D hidden, H heads.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from steep.kernels import add_rms_norm, attention, linear_cross_entropy, rms_norm, rope, swiglu

EPS = 1e-5
HEAD_DIM = 64


@dataclass
class Batch:
    tokens: torch.Tensor  # [T]
    labels: torch.Tensor  # [T], -100 at the end of each document
    positions: torch.Tensor  # [T], from 0 in each document
    cu_seqlens: torch.Tensor  # [N+1] int32: where documents begin and end
    max_seqlen: int  # known on the host, so that no kernel launch has to wait for the GPU


def make_batch(vocab: int, tokens: int, device: str) -> Batch:
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(int(torch.randint(1, 65, ())), tokens - sum(lengths)))
    documents = [(torch.randint(vocab, ()) + torch.randint(1, 4, ()) * torch.arange(n)) % vocab for n in lengths]
    labels = torch.cat([torch.cat([d[1:], torch.tensor([-100])]) for d in documents])
    positions = torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return Batch(*(t.to(device) for t in (torch.cat(documents), labels, positions, cu_seqlens)), max(lengths))


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int):
        super().__init__()
        self.split = [heads, kv_heads, kv_heads]
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, sum(self.split) * HEAD_DIM, bias=False)
        self.o = nn.Linear(heads * HEAD_DIM, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * 3 * hidden, bias=False)
        self.down = nn.Linear(3 * hidden, hidden, bias=False)

    def forward(self, x_TD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> torch.Tensor:
        qkv_THD = self.qkv(rms_norm(x_TD, self.attention_norm, EPS)).unflatten(1, (-1, HEAD_DIM))
        q, k, v = qkv_THD.split(self.split, dim=1)
        q, k = rope(q, k, cos, sin, batch.positions)
        o_TD = self.o(attention(q, k, v, batch.cu_seqlens, batch.max_seqlen).flatten(1))
        y_TD, x_TD = add_rms_norm(o_TD, x_TD, self.mlp_norm, EPS)
        return x_TD + self.down(swiglu(self.gate_up(y_TD)))


class Head(nn.Module):
    """Owns its weight and computes the loss in its own forward: that is what makes it right under FSDP2."""

    def __init__(self, hidden: int, vocab: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab, hidden) * hidden**-0.5)

    def forward(self, x_TD: torch.Tensor, labels: torch.Tensor, num_labels: torch.Tensor) -> torch.Tensor:
        loss, _ = linear_cross_entropy(x_TD, self.weight, labels, scale=num_labels.float().reciprocal())
        return loss


class Decoder(nn.Module):
    def __init__(self, vocab: int = 97, hidden: int = 128, layers: int = 2, max_positions: int = 4096):
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        heads = hidden // HEAD_DIM
        self.layers = nn.ModuleList([Layer(hidden, heads, max(heads // 2, 1)) for _ in range(layers)])
        self.norm = nn.Parameter(torch.ones(hidden))
        self.head = Head(hidden, vocab)
        self.max_positions = max_positions

    def rotary_tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin in fp32 whatever the model's dtype is."""
        inv_freq = 10_000.0 ** -(torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
        angles = torch.arange(self.max_positions, device=device)[:, None] * inv_freq
        return angles.cos(), angles.sin()

    def forward(self, batch: Batch, num_labels: torch.Tensor) -> torch.Tensor:
        """The sum of the losses of all labels divided by num_labels: their number in the global batch."""
        cos, sin = self.rotary_tables(batch.tokens.device)
        x_TD = self.embedding(batch.tokens)
        for layer in self.layers:
            x_TD = layer(x_TD, cos, sin, batch)
        return self.head(rms_norm(x_TD, self.norm, EPS), batch.labels, num_labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a packed batch")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Decoder(hidden=options.hidden, layers=options.layers).to(options.device, getattr(torch, options.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for step in range(options.steps):
        batch = make_batch(97, options.tokens, options.device)
        loss = model(batch, (batch.labels != -100).sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step == 0:
            print(f"step {step + 1:>4}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
