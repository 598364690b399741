"""Small real tokenizers, one of each family that base checkpoints come with. No file, no network; built once
a process.

A family is a name in `FAMILIES`; `make(name)` gives a tokenizer of one's own, which a test may add tokens to.
All have the special tokens `<pad>` and `</s>` (the end of text), those in `WITH_BOS` put `<s>` before every
text, those in `WITH_EOS` put `</s>` behind it. Those in `LOSSLESS` decode to the text they were given
(without special tokens), but for leading spaces.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = [PAD, BOS, EOS, UNK]
LINES = [
    "ann has 2 apples and bob has 3 apples .",
    "two and two is four; four and four is eight.",
    "The cat sat on the mat. Then the dog came, and the cat ran away!",
    "2+2=4 3+4=7 5+5=10 6*7=42 12-5=7 20/4=5",
    "the answer is 42, the question is unknown: what do you get?",
    "naïve café, ½ of it \\boxed{ the} \\boxed{x^{2}} so so",
]
"""What all are trained on."""


def _bpe_trainer(size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


@cache
def _byte_bpe() -> Tokenizer:
    """GPT-2, Qwen, Llama 3: bytes are tokens, a word carries its leading space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(LINES, _bpe_trainer(340))
    return tokenizer


@cache
def _sentencepiece() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and merges of a real sentencepiece model (BPE, byte fallback)."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        character_coverage=0.98,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        pad_piece=PAD,
        split_digits=True,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    vocabulary = {model.id_to_piece(i): i for i in range(len(model))}
    pairs = [
        (vocabulary[piece], piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return vocabulary, [(left, right) for _, left, right in sorted(pairs)]


def _llama() -> PreTrainedTokenizerFast:
    """Llama 2 and Mistral as transformers builds them: a dummy prefix, byte fallback, a BOS."""
    vocabulary, merges = _sentencepiece()
    return LlamaTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=PAD, add_bos_token=True)


def _fallback_bpe(normalizer: normalizers.Normalizer, strip: bool) -> Tokenizer:
    vocabulary, merges = _sentencepiece()
    tokenizer = Tokenizer(
        models.BPE(dict(vocabulary), list(merges), unk_token=UNK, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    return tokenizer


def _legacy_llama() -> Tokenizer:
    """Llama 2's own tokenizer.json: the dummy prefix comes from a normalizer, before each piece between
    special tokens.
    """
    prefix = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _fallback_bpe(prefix, strip=True)


def _gemma() -> Tokenizer:
    """Gemma: spaces become ▁, byte fallback, no dummy prefix."""
    return _fallback_bpe(normalizers.Replace(" ", "▁"), strip=False)


@cache
def _metaspace() -> Tokenizer:
    """T5 and its like: unigram pieces, a ▁ before every word, the first too; what it does not know is
    unknown.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=SPECIAL, unk_token=UNK, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


@cache
def _wordpiece() -> Tokenizer:
    """BERT: lower case, no spaces in tokens, ## where a word goes on."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _with(tokenizer: Tokenizer, before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """A copy, with special tokens around every text."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    known = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token]
    frame = " ".join(part for part in (before, "$A", after) if part)
    if known:
        template = processors.TemplateProcessing(single=frame, pair=f"{frame} $B", special_tokens=known)
        byte_level = isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
        steps = [processors.ByteLevel(trim_offsets=False), template] if byte_level else [template]
        tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_bpe": lambda: _with(_byte_bpe()),
    "byte_bpe_bos": lambda: _with(_byte_bpe(), BOS),
    "byte_bpe_eos": lambda: _with(_byte_bpe(), "", EOS),
    "sentencepiece": _llama,
    "sentencepiece_legacy": lambda: _with(_legacy_llama(), BOS),
    "sentencepiece_bos_eos": lambda: _with(_legacy_llama(), BOS, EOS),
    "gemma": lambda: _with(_gemma(), BOS),
    "metaspace": lambda: _with(_metaspace()),
    "metaspace_eos": lambda: _with(_metaspace(), "", EOS),
    "wordpiece": lambda: _with(_wordpiece()),
    "wordpiece_cls": lambda: _with(_wordpiece(), BOS, EOS),
}
WITH_BOS = frozenset(
    {
        "byte_bpe_bos",
        "sentencepiece",
        "sentencepiece_legacy",
        "sentencepiece_bos_eos",
        "gemma",
        "wordpiece_cls",
    }
)
WITH_EOS = frozenset({"byte_bpe_eos", "sentencepiece_bos_eos", "metaspace_eos", "wordpiece_cls"})
BYTES = frozenset(name for name in FAMILIES if name.startswith(("byte_bpe", "sentencepiece", "gemma")))
"""Those that can write any text: their vocabulary holds all bytes."""
LOSSLESS = BYTES


def make(name: str) -> PreTrainedTokenizerFast:
    """A new tokenizer of this family."""
    return FAMILIES[name]()
