"""Text to token ids and back, saved as JSON. Knows neither corpora nor models.

Word-level: lower-cased words (with an apostrophe suffix, as in "don't"), runs of digits, and every other
character that is not white space as a token of its own. BPE: byte-level, so no text is unknown.
Built on Hugging Face `tokenizers`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lm.errors import UserError

UNK = "<unk>"
WORD_PATTERN = r"[a-z0-9]+(?:'[a-z]+)?|[^\sa-z0-9]"
_UNLIMITED = 2**31 - 1
_SPACE_BEFORE_MARK = re.compile(r" ([.,;:!?%)\]}])")
_SPACE_AFTER_MARK = re.compile(r"([(\[{$]) ")


class Vocab:
    """A fixed set of tokens, numbered from 0; `<unk>` is always number 0."""

    def __init__(self, tokenizer: Tokenizer, kind: str) -> None:
        self._tokenizer = tokenizer
        self.kind = kind
        self.unk_id = 0

    @classmethod
    def build(cls, texts: Iterable[str], kind: str = "word", min_count: int = 2, bpe_vocab_size: int = 8000) -> Vocab:
        """Count tokens in `texts` (train alone) and keep those seen `min_count` times or more.

        Raises:
            UserError: no token is left.
        """
        if kind == "word":
            tokenizer = Tokenizer(models.WordLevel({UNK: 0}, unk_token=UNK))
            tokenizer.normalizer = normalizers.Lowercase()
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
            trainer = trainers.WordLevelTrainer(
                vocab_size=_UNLIMITED, min_frequency=min_count, special_tokens=[UNK], show_progress=False
            )
        else:
            tokenizer = Tokenizer(models.BPE(unk_token=UNK))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=bpe_vocab_size,
                min_frequency=min_count,
                special_tokens=[UNK],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
        tokenizer.train_from_iterator(texts, trainer)
        vocab = cls(tokenizer, kind)
        if len(vocab) < 2:
            raise UserError(
                f"the vocabulary must hold a word seen {min_count} times or more in the training text: "
                "got none. Try --min-count 1 or a larger corpus."
            )
        return vocab

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of the tokens of `text`; words outside the vocabulary become `unk_id`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_places(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """`encode` of many texts, each id with the character of its text at which the token ends."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [list(zip(e.ids, (end for _, end in e.offsets), strict=True)) for e in encoded]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The token of each id, as shown on the axes of attention maps.

        Raises:
            UserError: an id outside the vocabulary.
        """
        return [self._token(i) for i in ids]

    def _token(self, i: int) -> str:
        token = self._tokenizer.id_to_token(i)
        if token is None:
            raise UserError(
                f"a token id must be below the vocabulary's size {len(self)}: got {i}. "
                "Try the vocabulary that was saved with this model."
            )
        if self.kind == "word" or token == UNK:
            return token
        # A byte-level token is shown as the text it stands for; decode alone trims nothing here.
        return self._tokenizer.decode([i])

    def decode(self, ids: Sequence[int]) -> str:
        """Readable text of `ids`; case and spacing of the original are not kept by word-level tokens."""
        if self.kind == "bpe":
            return self._tokenizer.decode(list(ids), skip_special_tokens=False)
        text = " ".join(self.tokens(ids))
        return _SPACE_AFTER_MARK.sub(r"\1", _SPACE_BEFORE_MARK.sub(r"\1", text))

    def to_json(self) -> str:
        """The whole vocabulary as one JSON object; `from_json` is its inverse."""
        return json.dumps({"kind": self.kind, "tokenizer": json.loads(self._tokenizer.to_str())})

    @classmethod
    def from_json(cls, text: str) -> Vocab:
        """Rebuild from `to_json`.

        Raises:
            UserError: the text is not such an object.
        """
        try:
            saved = json.loads(text)
            return cls(Tokenizer.from_str(json.dumps(saved["tokenizer"])), saved["kind"])
        except Exception as e:  # tokenizers raises bare Exception on malformed input
            raise UserError(
                f"a vocabulary must be the JSON that this project wrote: got {e}. Try another copy of the checkpoint."
            ) from e
