"""Tiny random models of every family that ``aal.convert`` knows, and where its rules belong."""

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from helpers import cotangent_of
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.0")
timm = pytest.importorskip("timm")

TOKENS = 50
Levels = dict[int, tuple[str, ...]]


class Family(NamedTuple):
    """One kind of model.

    Args:
        make: a new one.
        inputs: keyword arguments of a model of a dtype.
        levels: names of the layers of each level, written by hand.
        tolerance: for float64. What rounds to float32 inside a model may flip one such rounding.
        dense_norms: every norm is one operation of PyTorch, so "exact" is bit-equal.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    levels: Levels
    tolerance: float = 1e-10
    dense_norms: bool = True

    def names(self, highest: int) -> list[str]:
        """The layers of the levels up to one."""
        return [name for level in range(1, highest + 1) for name in self.levels[level]]


def levels(prefixes: Sequence[str], *suffixes: str) -> Levels:
    """Names by level: each prefix with each suffix, of which there may be several in a word."""
    return {
        level: tuple(prefix + own for prefix in prefixes for own in suffixes[level - 1].split())
        for level in (1, 2, 3, 4)
    }


def merged(*parts: Levels) -> Levels:
    """The names of several parts."""
    return {level: sum((part[level] for part in parts), ()) for level in (1, 2, 3, 4)}


def numbered(prefix: str, count: int = 2) -> list[str]:
    return [prefix.format(i) for i in range(count)]


def random_tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=generator, dtype=torch.double).to(dtype)


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, TOKENS, shape, generator=torch.Generator().manual_seed(6))


def text(dtype: torch.dtype) -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": tokens(2, 7), "attention_mask": mask}


def text_pair(dtype: torch.dtype) -> dict[str, Tensor]:
    return text(dtype) | {"decoder_input_ids": tokens(2, 5)}


def pixels(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"pixel_values": random_tensor(2, 3, 16, 16, dtype=dtype)}


def image(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": random_tensor(2, 3, 16, 16, dtype=dtype)}


def sequence(dtype: torch.dtype) -> dict[str, Tensor]:
    return {"src": random_tensor(3, 5, 16, dtype=dtype)}


def padded_sequence(dtype: torch.dtype) -> dict[str, Tensor]:
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return sequence(dtype) | {"src_key_padding_mask": padding}


def sequence_pair(dtype: torch.dtype) -> dict[str, Tensor]:
    target = random_tensor(4, 3, 16, dtype=dtype)
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    memory = random_tensor(5, 3, 16, dtype=dtype)
    return {"tgt": target, "memory": memory, "tgt_mask": hidden, "tgt_is_causal": True}


_TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT |= {"intermediate_size": 24, "vocab_size": TOKENS, "max_position_embeddings": 32}
_IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_IMAGE |= {"intermediate_size": 24, "image_size": 16, "patch_size": 8}
_DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}
_BERT = ("output.dense", "intermediate.dense", "attention.output.dense")
_BERT += ("attention.self.query attention.self.key attention.self.value",)
_VIT = ("mlp.fc2", "mlp.fc1", "attention.o_proj")
_VIT += ("attention.q_proj attention.k_proj attention.v_proj",)
_TIMM = ("mlp.fc2", "mlp.fc1", "attn.proj", "attn.qkv")
_TORCH_SWIN = ("mlp.3", "mlp.0", "attn.proj", "attn.qkv")


def _t5(**options: Any) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=TOKENS, dropout_rate=0.1, **options)
    return transformers.T5ForConditionalGeneration(config)


def _t5_levels(first: str) -> Levels:
    own = "0.SelfAttention.{0}", "0.SelfAttention.q 0.SelfAttention.k 0.SelfAttention.v"
    cross = "1.EncDecAttention.q 1.EncDecAttention.k 1.EncDecAttention.v"
    encoder = [
        "1.DenseReluDense.wo",
        " ".join(f"1.DenseReluDense.{name}" for name in first.split()),
        own[0].format("o"),
        own[1],
    ]
    decoder = [
        "2.DenseReluDense.wo",
        " ".join(f"2.DenseReluDense.{name}" for name in first.split()),
        own[0].format("o") + " 1.EncDecAttention.o",
        f"{own[1]} {cross}",
    ]
    return merged(
        levels(numbered("encoder.block.{}.layer."), *encoder),
        levels(numbered("decoder.block.{}.layer."), *decoder),
    )


def _image_levels(name: str) -> Levels:
    """ViT, DeiT and Swin of transformers, whose parts had the names of BERT's."""
    vit = importlib.import_module("transformers.models.vit.modeling_vit")
    had_old_names = hasattr(vit, "ViTIntermediate")
    if name == "swin":
        first, second = "swin.encoder.layers.0.blocks.{}.", "swin.encoder.layers.1.blocks.0."
        return levels([*numbered(first), second], *(_BERT if had_old_names else _VIT))
    if not had_old_names:
        return levels(numbered(name + ".layers.{}."), *_VIT)
    old = (*_BERT[:3], _BERT[3].replace("attention.self", "attention.attention"))
    return levels(numbered(name + ".encoder.layer.{}."), *old)


def _encoder_decoder_layers() -> Levels:
    """BART, and what is named like it."""
    own, cross = "self_attn.out_proj", "encoder_attn.out_proj"
    projections = "{0}.q_proj {0}.k_proj {0}.v_proj"
    inner = projections.format("self_attn")
    both = f"{inner} {projections.format('encoder_attn')}"
    encoder, decoder = (numbered(f"model.{part}.layers.{{}}.") for part in ("encoder", "decoder"))
    return merged(
        levels(encoder, "fc2", "fc1", own, inner),
        levels(decoder, "fc2", "fc1", f"{own} {cross}", both),
    )


def _hugging_face() -> dict[str, Family]:
    tf = transformers
    bert = {**_TEXT, **_DROPOUT}
    distil = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": TOKENS}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": TOKENS, "n_positions": 32}
    swin = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1]}
    swin |= {"num_heads": [2, 2], "window_size": 2}
    gated = {"feed_forward_proj": "gated-gelu"}
    bart = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
    }
    bart |= {"d_model": 16, "vocab_size": TOKENS, "max_position_embeddings": 32}
    opt = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    opt |= {"num_attention_heads": 2, "vocab_size": TOKENS, "max_position_embeddings": 32}
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    deberta = (*_BERT[:3], " ".join(f"{name}_proj" for name in _BERT[3].split()))
    return {
        "bert": Family(
            lambda: tf.BertForSequenceClassification(tf.BertConfig(**bert)),
            text,
            levels(numbered("bert.encoder.layer.{}."), *_BERT),
        ),
        "roberta": Family(
            lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**bert)),
            text,
            levels(numbered("roberta.encoder.layer.{}."), *_BERT),
        ),
        "distilbert": Family(
            lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**distil)),
            text,
            levels(
                numbered("distilbert.transformer.layer.{}."),
                "ffn.lin2",
                "ffn.lin1",
                "attention.out_lin",
                "attention.q_lin attention.k_lin attention.v_lin",
            ),
        ),
        "gpt2": Family(
            lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2)),
            text,
            levels(
                numbered("transformer.h.{}."),
                "mlp.c_proj",
                "mlp.c_fc",
                "attn.c_proj",
                "attn.c_attn",
            ),
        ),
        "llama": Family(
            lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_TEXT, num_key_value_heads=1)),
            text,
            levels(
                numbered("model.layers.{}."),
                "mlp.down_proj",
                "mlp.gate_proj mlp.up_proj",
                "self_attn.o_proj",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            ),
            tolerance=1e-5,
            dense_norms=False,
        ),
        "t5": Family(_t5, text_pair, _t5_levels("wi"), 1e-5, False),
        "t5-gated": Family(lambda: _t5(**gated), text_pair, _t5_levels("wi_0 wi_1"), 1e-5, False),
        "deberta": Family(
            lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**bert, **relative)),
            text,
            levels(numbered("deberta.encoder.layer.{}."), *deberta),
            tolerance=1e-5,
        ),
        "bart": Family(
            lambda: tf.BartForConditionalGeneration(tf.BartConfig(**bart)),
            text_pair,
            _encoder_decoder_layers(),
        ),
        "opt": Family(
            lambda: tf.OPTForCausalLM(tf.OPTConfig(**opt)),
            text,
            levels(
                numbered("model.decoder.layers.{}."),
                "fc2",
                "fc1",
                "self_attn.out_proj",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            ),
        ),
        "vit": Family(
            lambda: tf.ViTForImageClassification(tf.ViTConfig(**_IMAGE, **_DROPOUT)),
            pixels,
            _image_levels("vit"),
        ),
        "deit": Family(
            lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**_IMAGE)),
            pixels,
            _image_levels("deit"),
        ),
        "swin": Family(
            lambda: tf.SwinForImageClassification(tf.SwinConfig(**swin)),
            pixels,
            _image_levels("swin"),
        ),
    }


def _timm() -> dict[str, Family]:
    vit = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 16, "patch_size": 8}
    vit |= {"num_classes": 5}
    swin = {"depths": (2, 1), "embed_dim": 8, "num_heads": (2, 2), "img_size": 16}
    swin |= {"window_size": 4, "patch_size": 2, "num_classes": 5}
    mixer = {"img_size": 16, "patch_size": 8, "num_blocks": 2, "embed_dim": 16, "num_classes": 5}
    create = timm.create_model
    blocks = numbered("blocks.{}.")
    return {
        "timm-vit": Family(
            lambda: create("vit_tiny_patch16_224", proj_drop_rate=0.1, **vit),
            image,
            levels(blocks, *_TIMM),
        ),
        "timm-deit": Family(
            lambda: create("deit_tiny_distilled_patch16_224", attn_drop_rate=0.1, **vit),
            image,
            levels(blocks, *_TIMM),
        ),
        "timm-swin": Family(
            lambda: create("swin_tiny_patch4_window7_224", **swin),
            image,
            levels([*numbered("layers.0.blocks.{}."), "layers.1.blocks.0."], *_TIMM),
        ),
        "timm-swin2": Family(
            lambda: create("swinv2_tiny_window8_256", act_layer=nn.GELU, **swin),
            image,
            levels([*numbered("layers.0.blocks.{}."), "layers.1.blocks.0."], *_TIMM),
        ),
        "timm-beit": Family(
            lambda: create("beit_base_patch16_224", **vit), image, levels(blocks, *_TIMM)
        ),
        "timm-eva": Family(
            lambda: create("eva_large_patch14_196", **vit), image, levels(blocks, *_TIMM)
        ),
        "timm-mixer": Family(
            lambda: timm.models.MlpMixer(**mixer, proj_drop_rate=0.1),
            image,
            levels(
                blocks, "mlp_channels.fc2", "mlp_channels.fc1", "mlp_tokens.fc2", "mlp_tokens.fc1"
            ),
        ),
    }


def _torchvision() -> dict[str, Family]:
    module = torchvision.models.swin_transformer
    swin = ([4, 4], 8, [2], [2], [2, 2])
    second = {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2}
    swin_blocks = numbered("features.1.{}.")
    return {
        "torchvision-vit": Family(
            lambda: torchvision.models.VisionTransformer(
                16, 8, 2, 2, 16, 24, dropout=0.1, attention_dropout=0.1, num_classes=5
            ),
            image,
            levels(
                numbered("encoder.layers.encoder_layer_{}."),
                "mlp.3",
                "mlp.0",
                "self_attention.out_proj",
                "self_attention",
            ),
        ),
        "torchvision-swin": Family(
            lambda: torchvision.models.SwinTransformer(
                *swin, dropout=0.1, attention_dropout=0.1, num_classes=5
            ),
            image,
            levels(swin_blocks, *_TORCH_SWIN),
        ),
        "torchvision-swin2": Family(
            lambda: torchvision.models.SwinTransformer(*swin, num_classes=5, **second),
            image,
            levels(swin_blocks, *_TORCH_SWIN),
        ),
    }


def _torch() -> dict[str, Family]:
    own = ("linear2", "linear1", "self_attn.out_proj", "self_attn")
    cross = (*own[:2], "self_attn.out_proj multihead_attn.out_proj", "self_attn multihead_attn")

    def encoder(**options: Any) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 24, **options)
        return nn.TransformerEncoder(
            layer, 2, enable_nested_tensor=options.get("batch_first", False)
        )

    return {
        "encoder": Family(encoder, sequence, levels(numbered("layers.{}."), *own)),
        "encoder-batch-first": Family(
            lambda: encoder(batch_first=True, activation="gelu"),
            padded_sequence,
            levels(numbered("layers.{}."), *own),
        ),
        "decoder-layer": Family(
            lambda: nn.TransformerDecoderLayer(16, 2, 24), sequence_pair, levels([""], *cross)
        ),
    }


HUGGING_FACE = _hugging_face()
FAMILIES = HUGGING_FACE | _timm() | _torchvision() | _torch()
BEHIND_RELU = {
    "t5",
    "opt",
    "encoder",
    "decoder-layer",
}  # whose second feed-forward layers read a ReLU
CALLS_GELU = {"encoder-batch-first"}  # as a function, which is left alone
GATED = {"llama", "t5-gated"}  # the product with the activation needs its value anyway
every_family = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def _made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return randomised(FAMILIES[name].make())


def randomised(model: nn.Module) -> nn.Module:
    """Move every parameter, so that none is zero, one or tiny, in training mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def model_of(name: str, dtype: torch.dtype = torch.double) -> nn.Module:
    """A model of a family, always with the same parameters."""
    return copy.deepcopy(_made(name)).to(dtype)


def inputs_of(name: str, dtype: torch.dtype = torch.double) -> dict[str, Any]:
    return FAMILIES[name].inputs(dtype)


def output_of(model: nn.Module, inputs: dict[str, Any], seed: int = 7) -> Tensor:
    """Logits, or what the model returns; dropout draws the same on every call."""
    torch.manual_seed(seed)
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output and gradients of parameters, and of inputs that have any, from a random cotangent."""
    leaves = {
        name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    model.zero_grad()
    y = output_of(model, leaves)
    y.backward(cotangent_of(y))
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads |= {name: x.grad for name, x in leaves.items() if isinstance(x, Tensor)}
    model.zero_grad()
    return y.detach(), grads
