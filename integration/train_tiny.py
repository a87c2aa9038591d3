#!/usr/bin/env python3
"""Train the tiny English model that demo and tests use, and write it as GGUF.

    text of six novels -> byte tokens -> 4-layer llama, bf16 autocast on the CPU -> F16 GGUF

usage: train_tiny.py [--package FILE.deb] [--out FILE.gguf] [--heldout FILE.txt] [--steps N] [--seed N]
needs: torch==2.13.0 gguf numpy, and Debian's r-cran-janeaustenr (fetched with apt-get when --package is not given)

The text is Jane Austen's six novels (1811-1817, public domain), as packed under the MIT licence by Julia Silge.
The same seed, thread count, torch and CPU type give the same file.
"""
import argparse
import math
import re
import subprocess
import tempfile
import time
import zlib
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent

# 8 heads over 4 KV heads, so that 8 ranks have to hold a KV head twice; every width a multiple of 256, so that
# k-quants fit; 1.7 M parameters, 3.4 MB in F16.
N_LAYER, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, HEAD_DIM, N_CTX = 4, 256, 256, 8, 4, 32, 512
ROPE_BASE, NORM_EPS = 10000.0, 1e-5

# Vocabulary: specials, a token per byte, and the word mark. The SPM tokenizer turns each space into the mark before
# it looks anything up, so the mark must be a token of its own or it would come out of the byte tokens as is.
UNK, BOS, EOS, FIRST_BYTE, WORD_MARK = 0, 1, 2, 3, 259
N_VOCAB = 260

HELDOUT_BYTES = 16384
PLAIN_PUNCTUATION = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-"}


# ---- text -----------------------------------------------------------------------------------------------------------


def read_r_strings(serialized: bytes) -> list[str]:
    """The elements of a character vector in R's XDR serialisation, version 3 (the only thing the package holds)."""

    def word(at: int) -> int:
        return int.from_bytes(serialized[at : at + 4], "big", signed=True)

    if serialized[:2] != b"X\n" or word(2) != 3:
        raise ValueError("not an R object in XDR format, version 3")
    at = 18 + word(14)  # the name of the native encoding follows its length
    if word(at) & 0xFF != 16:
        raise ValueError("not a character vector")
    n_strings, at = word(at + 4), at + 8
    strings = []
    for _ in range(n_strings):  # each: flags, length (-1 is NA), bytes
        length = word(at + 4)
        strings.append(serialized[at + 8 : at + 8 + max(length, 0)].decode("utf-8", "replace"))
        at += 8 + max(length, 0)
    return strings


def read_novels(package: Path) -> list[str]:
    """The novels in a r-cran-janeaustenr package: plain ASCII, one line a paragraph, an empty line between."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        database = (Path(folder) / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = []
    while database:  # records of a 4-byte length and a zlib stream
        stream = zlib.decompressobj()
        lines = read_r_strings(stream.decompress(database[4:]))
        database = stream.unused_data
        text = "\n".join(line.strip() for line in lines)
        for fancy, plain in PLAIN_PUNCTUATION.items():
            text = text.replace(fancy, plain)
        text = text.encode("ascii", "ignore").decode().replace("_", "")  # underscores stood for italics
        paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text)]
        novels.append("\n\n".join(p for p in paragraphs if p) + "\n\n")
    return novels


def fetch_package(folder: str) -> Path:
    subprocess.run(["apt-get", "download", "r-cran-janeaustenr"], cwd=folder, check=True)
    return next(Path(folder).glob("r-cran-janeaustenr_*.deb"))


def split_heldout(novels: list[str]) -> tuple[str, str]:
    """(training text, held-out text): the end of "Pride and Prejudice" is held out, from the start of a paragraph."""
    index = next(i for i, novel in enumerate(novels) if novel.startswith("PRIDE AND PREJUDICE"))
    cut = novels[index].rindex("\n\n", 0, len(novels[index]) - HELDOUT_BYTES) + 2
    heldout = novels[index][cut:]
    kept = [*novels[:index], novels[index][:cut], *novels[index + 1 :]]
    return "".join(kept), heldout.rstrip() + "\n"


def encode(text: str) -> np.ndarray:
    """Tokens as the host's tokenizer gives them, without <s>."""
    raw = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return np.where(raw == ord(" "), WORD_MARK, raw + FIRST_BYTE)


def decode(tokens: list[int]) -> str:
    raw = bytes(32 if t == WORD_MARK else t - FIRST_BYTE for t in tokens if t >= FIRST_BYTE)
    return raw.decode("utf-8", "replace")


# ---- model ----------------------------------------------------------------------------------------------------------


class RmsNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(N_EMBD))

    def forward(self, x):
        return F.rms_norm(x.float(), (N_EMBD,), self.weight, NORM_EPS)


def linear(n_in: int, n_out: int, gain: float = 1.0) -> torch.nn.Linear:
    layer = torch.nn.Linear(n_in, n_out, bias=False)
    torch.nn.init.normal_(layer.weight, std=gain * n_in**-0.5)
    return layer


def rotate(x, cos, sin):
    """Rope over neighbouring pairs, ggml's NORMAL mode: no permutation is needed at export."""
    even, odd = x[..., 0::2], x[..., 1::2]  # x: [batch, head, token, head_dim]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Layer(torch.nn.Module):
    """One llama layer; the attributes are named as GGUF names the tensors."""

    def __init__(self):
        super().__init__()
        into_residual = (2 * N_LAYER) ** -0.5
        self.attn_norm, self.ffn_norm = RmsNorm(), RmsNorm()
        self.attn_q = linear(N_EMBD, N_HEAD * HEAD_DIM)
        self.attn_k = linear(N_EMBD, N_HEAD_KV * HEAD_DIM)
        self.attn_v = linear(N_EMBD, N_HEAD_KV * HEAD_DIM)
        self.attn_output = linear(N_HEAD * HEAD_DIM, N_EMBD, into_residual)
        self.ffn_gate, self.ffn_up = linear(N_EMBD, N_FF), linear(N_EMBD, N_FF)
        self.ffn_down = linear(N_FF, N_EMBD, into_residual)

    def forward(self, x, cos, sin):  # x: [batch, token, n_embd]
        n_batch, n_tokens, _ = x.shape

        def heads(y):
            return y.view(n_batch, n_tokens, -1, HEAD_DIM).transpose(1, 2)

        h = self.attn_norm(x)
        q, k = rotate(heads(self.attn_q(h)), cos, sin), rotate(heads(self.attn_k(h)), cos, sin)
        v = heads(self.attn_v(h))
        attn = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        x = x + self.attn_output(attn.transpose(1, 2).reshape(n_batch, n_tokens, -1))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embd = torch.nn.Embedding(N_VOCAB, N_EMBD)
        self.blk = torch.nn.ModuleList(Layer() for _ in range(N_LAYER))
        self.output_norm = RmsNorm()
        self.output = linear(N_EMBD, N_VOCAB, 0.1)  # near-uniform first predictions
        frequency = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
        angle = torch.outer(torch.arange(N_CTX).float(), frequency)  # [token, head_dim / 2]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens):  # [batch, token] -> [batch, token, n_vocab]
        x = self.token_embd(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.blk:
            x = layer(x, cos, sin)
        return self.output(self.output_norm(x))


# ---- training -------------------------------------------------------------------------------------------------------


def draw_batch(tokens: np.ndarray, starts: np.ndarray, n_batch: int, rng: np.random.Generator) -> torch.Tensor:
    """[n_batch, N_CTX + 1] windows, each led by <s>; half begin a paragraph, as a prompt does, half anywhere."""
    anywhere = rng.integers(0, len(tokens) - N_CTX, n_batch)
    paragraph = starts[rng.integers(0, len(starts), n_batch)]
    begin = np.where(np.arange(n_batch) % 2 == 0, paragraph, anywhere)
    windows = tokens[begin[:, None] + np.arange(N_CTX)]
    return torch.from_numpy(np.concatenate((np.full((n_batch, 1), BOS), windows), 1))


def loss_of(model: Llama, windows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: Llama, text: str) -> float:
    tokens = encode(text)
    windows = tokens[: len(tokens) // N_CTX * N_CTX].reshape(-1, N_CTX)
    windows = np.concatenate((np.full((len(windows), 1), BOS), windows), 1)
    return loss_of(model, torch.from_numpy(windows)).item()


@torch.no_grad()
def continue_text(model: Llama, prompt: str, n_tokens: int) -> str:
    tokens = [BOS, *encode(prompt).tolist()]
    for _ in range(n_tokens):
        tokens.append(model(torch.tensor([tokens[-N_CTX:]]))[0, -1].argmax().item())
    return decode(tokens)


def train(model: Llama, text: str, heldout: str, args) -> None:
    tokens = encode(text)
    starts = np.array([m.end() for m in re.finditer("\n\n", text)])
    starts = starts[starts < len(tokens) - N_CTX]
    rng = np.random.default_rng(args.seed)
    matrices = [p for p in model.blk.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def rate(step):  # warm-up, then a half cosine down to 2 %
        progress = step / args.steps
        return min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    begin, next_export_s = time.monotonic(), args.export_every_s
    for step in range(args.steps):
        loss = loss_of(model, draw_batch(tokens, starts, args.batch, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        elapsed_s = time.monotonic() - begin
        if step % 100 == 0 or step + 1 == args.steps:
            print(f"step {step:5} train {loss.item():.4f} heldout {heldout_loss(model, heldout):.4f} "
                  f"nats/byte, {elapsed_s:.0f} s", flush=True)
        if elapsed_s > next_export_s:
            export(model, args.out)
            next_export_s += args.export_every_s


# ---- export ---------------------------------------------------------------------------------------------------------


def add_byte_tokenizer(writer: gguf.GGUFWriter) -> None:
    types = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581"])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([types.UNKNOWN, types.CONTROL, types.CONTROL, *([types.BYTE] * 256), types.NORMAL])
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def export(model: Llama, out: Path) -> None:
    """Write matrices as F16 and norms as F32; the file appears whole or not at all."""
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_name("ggml-tp tiny English")
    writer.add_description("byte-level llama trained on Jane Austen's novels; made by integration/train_tiny.py")
    writer.add_license("MIT")
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_byte_tokenizer(writer)
    for name, value in model.state_dict().items():
        writer.add_tensor(name, value.numpy().astype(np.float16 if value.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "plugin/ggml_tp/models/tiny-english.gguf")
    parser.add_argument("--heldout", type=Path, default=ROOT / "tests/data/heldout.txt")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-every-s", type=float, default=60)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)

    with tempfile.TemporaryDirectory() as folder:
        novels = read_novels(args.package or fetch_package(folder))
    text, heldout = split_heldout(novels)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.heldout.parent.mkdir(parents=True, exist_ok=True)
    args.heldout.write_text(heldout)
    model = Llama()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(text)} bytes to train on, "
          f"{len(heldout)} held out")
    train(model, text, heldout, args)
    export(model, args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    print(continue_text(model, "It was a ", 300))


if __name__ == "__main__":
    main()
