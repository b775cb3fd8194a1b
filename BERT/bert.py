"""BERT with a classifier on its first token, as Hugging Face ``transformers`` builds it."""

import inspect
import json

import torch
import transformers
from architecture import MAX_LENGTH, Architecture
from hub import loaded
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

# Kin of RoBERTa number positions from behind the id that fills up texts.
_SHIFTED = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert")
_SHIFTED += ("mpnet", "longformer", "ibert", "data2vec-text", "xmod")
_POOLER = "pooler."  # not every published network of this kind has one


def new_config(sizes: Architecture, vocabulary: int, classes: int) -> PreTrainedConfig:
    """The configuration of a network with new weights.

    Raises:
        ValueError: the heads do not divide the width.
    """
    if sizes.width % sizes.heads:
        raise ValueError(f"{sizes.heads} heads do not divide a width of {sizes.width}")
    return transformers.BertConfig(
        vocab_size=vocabulary,
        num_hidden_layers=sizes.depth,
        hidden_size=sizes.width,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp_width,
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
        initializer_range=sizes.initial_sd,
        max_position_embeddings=MAX_LENGTH,
        num_labels=classes,
    )


def pretrained_config(name: str) -> PreTrainedConfig:
    """The configuration of a published network: in a folder, or by its name on the hub.

    Raises:
        ValueError: there is none, or that of a network of another kind.
    """
    config = loaded(name, AutoConfig.from_pretrained)
    for needed in ("pad_token_id", "max_position_embeddings", "vocab_size"):
        if getattr(config, needed, None) is None:
            raise ValueError(f"{name} is no network like BERT: its configuration has no {needed}")
    return config


def longest_text(config: PreTrainedConfig) -> int:
    """Tokens for which a network has positions."""
    positions = config.max_position_embeddings
    if config.model_type in _SHIFTED:
        return positions - config.pad_token_id - 1
    return positions


def config_from(text: str) -> PreTrainedConfig:
    """The configuration that ``to_json_string`` made ``text`` of.

    Raises:
        ValueError: it did not.
    """
    try:
        values = json.loads(text)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # transformers checks values with errors of many types
        raise ValueError("the configuration of the network is none of this version") from error


def new(config: PreTrainedConfig) -> nn.Module:
    """A network with new weights."""
    return AutoModelForSequenceClassification.from_config(config)


def pretrained(name: str, config: PreTrainedConfig) -> tuple[nn.Module, bool]:
    """A network with published weights and a new classifier, and whether its pooler is new too.

    Args:
        config: of that network, with as many labels as are wanted.

    Raises:
        ValueError: the weights are missing or do not fit.
    """
    model, found = loaded(
        name,
        AutoModelForSequenceClassification.from_pretrained,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # of a classifier of other classes; others are refused below
    )
    body = f"{model.base_model_prefix}."
    absent = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    absent = sorted(key for key in absent if key.startswith(body))
    wrong = [key for key in absent if not key.startswith(body + _POOLER)]
    if wrong:
        raise ValueError(f"{name} lacks weights of {wrong[0]} ({len(wrong)} in all)")
    return model, bool(absent)


def replay_layers(model: nn.Module) -> None:
    """Keep the inputs of layers alone, and compute the rest of a layer again in backward.

    Raises:
        ValueError: the network cannot.
    """
    model.config.use_cache = False  # of decoders; transformers would tell the user to do so
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new name, old
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False})


def has_segments(model: nn.Module) -> bool:
    """Does the network tell the first text of a pair from the second?"""
    has_input = "token_type_ids" in inspect.signature(model.forward).parameters
    return has_input and getattr(model.config, "type_vocab_size", 2) > 1
