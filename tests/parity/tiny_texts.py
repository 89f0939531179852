"""Tiny random text encoders with tokenizers that know every byte, and whole words of the published templates."""

import re

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from kinema.interop.captions import HUNYUAN_VIDEO_15_TEMPLATE, HUNYUAN_VIDEO_TEMPLATE

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def randomised(model, seed=0):
    """Every weight random, none of them trivial."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def byte_tokenizer(start=None, end=None, words=()):
    """One token a byte; some words are one token; `start` and `end` stand around every caption."""
    special = ["<pad>", *(token for token in (start, end) if token)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    around = [(token, vocabulary[token]) for token in (start, end) if token]
    single = " ".join(filter(None, [start, "$A", end]))
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in sorted(set(words))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token=start, eos_token=end)


def words_of(template):
    return re.findall(r"<\|\w+\|>|\w{3,}", template)


T5 = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 3}
LLM = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
       "num_key_value_heads": 1, "max_position_embeddings": 2048}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def t5():
    tokenizer = byte_tokenizer(end="</s>")
    return randomised(T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5))), tokenizer


def umt5():
    tokenizer = byte_tokenizer(end="</s>")
    return randomised(UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **T5))), tokenizer


def byt5():
    tokenizer = ByT5Tokenizer()
    return randomised(T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5))), tokenizer


def clip():
    tokenizer = byte_tokenizer(start="<start>", end="<end>")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return randomised(CLIPTextModel(config)), tokenizer


def llama():
    tokenizer = byte_tokenizer(start="<|begin_of_text|>", words=words_of(HUNYUAN_VIDEO_TEMPLATE))
    return randomised(LlamaModel(LlamaConfig(vocab_size=len(tokenizer), **TOKENS, **LLM))), tokenizer


def qwen():
    tokenizer = byte_tokenizer(words=words_of(HUNYUAN_VIDEO_15_TEMPLATE))
    tokenizer.chat_template = CHAT
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLTextConfig(vocab_size=len(tokenizer), rope_parameters=rope, **TOKENS, **LLM)
    return randomised(Qwen2_5_VLTextModel(config)), tokenizer
