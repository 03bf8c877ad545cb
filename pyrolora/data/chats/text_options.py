"""How texts are read for a causal language model: their length, and what of them is learnt."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyrolora import defaults
from pyrolora.checks import true_or_false, whole_number
from pyrolora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How a causal language model reads texts and chats, in the words of TRL's ``SFTConfig``.

    Attributes
    ----------
    max_length
        The most tokens of an example, of which the first are kept; None: as many as the network
        and the tokenizer read. Neither reads more in any case. Rows that come as tokens are cut
        only where these options are passed.
    completion_only_loss
        Whether log p(y) has the tokens of the completion alone. None: where the data have prompts
        and completions (`pyrolora.data.chats.dialogues`), or a ``completion_mask``.
    assistant_only_loss
        Whether log p(y) has the tokens of the assistant's messages alone, those of all turns. With
        a completion, it has those of the assistant in it.
    packing
        Whether a fit puts several texts in a row of at most ``max_length`` tokens, best fit first,
        longest text first. Texts of a row do not see each other, n still counts texts, and log p
        is the same sum; the batch size counts rows. Predictions have a row per text.
    dataset_text_field
        The column of texts.

    Raises
    ------
    ConfigError
        For values of another type, and a ``max_length`` below 2, where nothing can be predicted.
    """

    max_length: int | None = defaults.MAX_LENGTH
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    packing: bool = False
    dataset_text_field: str = "text"

    def __post_init__(self) -> None:
        if self.max_length is not None:
            whole_number("max_length", self.max_length, at_least=2, at_most=math.inf)
            object.__setattr__(self, "max_length", int(self.max_length))  # NumPy's, as JSON
        if self.completion_only_loss is not None:
            true_or_false("completion_only_loss", self.completion_only_loss)
        true_or_false("assistant_only_loss", self.assistant_only_loss)
        true_or_false("packing", self.packing)
        if not isinstance(self.dataset_text_field, str) or not self.dataset_text_field:
            raise ConfigError(
                "dataset_text_field must be the name of a column, got "
                f"{self.dataset_text_field!r}; 'text' is the default"
            )
