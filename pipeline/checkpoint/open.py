"""A model folder, opened once: a checkpoint of this program, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.folder import CONFIG, DESCRIPTION, TRAINING_STATE, Description, read_description, verify_files
from pipeline.checkpoint.layouts import layout_for, layout_of
from pipeline.checkpoint.safetensors_files import Stored, check_tensors, open_tensors, weight_files
from pipeline.config.keys import ModelConfig
from pipeline.config.load import from_dict
from pipeline.errors import UserError
from pipeline.files import parse_json, read_limited
from pipeline.log import logger
from pipeline.vocabulary.byte_pair import BytePairTokenizer
from pipeline.vocabulary.huggingface_files import is_gpt2, open_folder
from pipeline.vocabulary.merges import PUBLISHED
from pipeline.vocabulary.specs import from_spec
from pipeline.vocabulary.tokenizer import Tokenizer

MOST_CONFIG_BYTES = 1 << 20
# Vocabularies are padded to multiples of 64 to 1,024 for the sake of matrix units: GPT-2's 50,257
# rows to 50,304.
MOST_PADDING_ROWS = 1023


@dataclass(frozen=True)
class OpenModel:
    """What a folder holds, its tensors checked against its config and not yet read.

    Tensors may have more rows than the vocabulary: padding that is left out. Only a checkpoint of
    this program has a description.
    """

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: dict[str, Stored]
    description: Description | None


def open_model(folder: Path, verify: bool = True) -> OpenModel:
    """Open a model folder; with `verify`, the hashes of a checkpoint's files are checked. Raises
    UserError.
    """
    description = None
    if (folder / DESCRIPTION).is_file():
        description = read_description(folder)
        try:
            config, spec = from_dict(description.config).model, description.tokenizer
        except UserError as error:
            raise UserError(f"{folder / DESCRIPTION}: {error}") from None
        # Not the optimizer's state, two thirds of the bytes: a model does not need it.
        if verify:
            verify_files(folder, description, without=(TRAINING_STATE,))
        tokenizer, vocab_rows = from_spec(spec, folder), spec["vocab_size"]
    elif (folder / CONFIG).is_file():
        config, vocab_rows = _foreign_config(folder / CONFIG)
        tokenizer = _foreign_tokenizer(folder, vocab_rows)
    else:
        raise UserError(f"{folder} is not a checkpoint: it has neither {DESCRIPTION} nor a Hugging Face {CONFIG}")
    tensors = open_weights(folder, config, vocab_rows)
    return OpenModel(folder, config, tokenizer, tensors=tensors, description=description)


def open_weights(folder: Path, config: ModelConfig, vocab_rows: int) -> dict[str, Stored]:
    """A folder's tensors by their stored names. Raises UserError unless they are those of a model
    with this config.
    """
    layout = layout_of(config)
    tensors = open_tensors(weight_files(folder), layout.current_name)
    # Before their shapes are listed: a config.json of a stranger may claim a billion layers.
    if config.n_layer > len(tensors):
        raise UserError(f"{folder} does not fit the model: {config.n_layer} layers of {len(tensors)} tensors")
    ignored = {name for name in tensors if layout.is_ignored(config, name)}
    check_tensors(folder, layout.shapes(config, vocab_rows), tensors, ignored)
    return tensors


def _foreign_config(path: Path) -> tuple[ModelConfig, int]:
    """The model's config and the rows of its vocabulary. Raises UserError for a model that is not
    implemented.
    """
    try:
        document = parse_json(read_limited(path, MOST_CONFIG_BYTES))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a JSON object: expected a Hugging Face config")
    return layout_for(document, str(path)).model_config(document, str(path))


def _foreign_tokenizer(folder: Path, rows: int) -> Tokenizer:
    tokenizer = open_folder(folder)
    if tokenizer is None:
        if rows != PUBLISHED["gpt2"].vocab_size:
            raise UserError(
                f"{folder} has {rows} tokens and neither tokenizer.json nor vocab.json and merges.txt: its vocabulary is "
                f"unknown; without them, only {PUBLISHED['gpt2'].vocab_size} tokens are taken for GPT-2's vocabulary"
            )
        return BytePairTokenizer("gpt2")
    padding = rows - tokenizer.vocab_size
    if not 0 <= padding <= MOST_PADDING_ROWS:
        raise UserError(
            f"{folder} has {rows} rows for the {tokenizer.vocab_size} tokens of its vocabulary: expected as many, or up to "
            f"{MOST_PADDING_ROWS} more; the files are of different models"
        )
    if padding:
        logger.info("%s: %d rows beyond its vocabulary of %d tokens are ignored", folder, padding, tokenizer.vocab_size)
    # By content: under its published name it matches datasets prepared with it.
    return BytePairTokenizer("gpt2") if is_gpt2(tokenizer) else tokenizer
