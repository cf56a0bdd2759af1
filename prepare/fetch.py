"""`pipeline fetch`: a corpus and a vocabulary into Hugging Face's cache, for machines without a
network.
"""

from pipeline.errors import UserError
from prepare.encoding.vocabulary import check_name, learns_from_corpus, open_vocabulary
from prepare.sources.hub import fetch_hub
from prepare.sources.local import Shakespeare
from prepare.sources.names import hub_source
from prepare.storage.files import is_url, shown
from prepare.units import Reading


def run(source: str, tokenizer: str, split: str = Reading.split) -> dict[str, str]:
    """Download what the cache lacks; the environment variables that make the other commands read it
    alone.
    """
    from huggingface_hub import constants

    # The vocabulary first: a misspelt name is found before gigabytes of text are downloaded.
    check_name(tokenizer)
    if not learns_from_corpus(tokenizer):
        open_vocabulary(tokenizer)
    if hub := hub_source(source):
        fetch_hub(hub, split)
    elif source == "shakespeare":
        _ = Shakespeare(Reading()).path
    elif is_url(source):
        raise UserError(f"{shown(source)} is not a dataset of the Hub: download it with any tool and name the file")
    else:
        raise UserError(f"{source!r} needs no fetching: expected a named corpus of the Hub or hf:ORG/NAME")
    return {"HF_HOME": constants.HF_HOME, "HF_HUB_OFFLINE": "1"}
