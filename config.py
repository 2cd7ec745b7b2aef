"""The contract of the pipeline and its knobs: the one place to change a setting.

UPPER_CASE constants are the contract: what would make yesterday's vectors or files
wrong if it changed (prompts, image preparation, folder and file formats). They enter
the fingerprints that the phases compare.

`Config` holds the knobs. Every field is a command-line flag of the phases that use it
(`_` becomes `-`), made by `parse_config`: one place to look, one way to override.
"""

import argparse
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

PROGRAM_VERSION = "1.7.0"
"""Version of the program, written into every manifest."""

# --- Classes ------------------------------------------------------------------------

CLASS_NAMES = ("FDT", "MTF", "TOR")
"""Class folders that phase 1 creates; any other folder name is a class as well."""

BACKGROUND_CLASSES = ("FDT",)
"""Classes without an object in the beam: described with BACKGROUND_PROMPTS."""

INCONCLUSIVE = "no concluyente"
"""What phase 4 prints where it should not name a class."""

# --- Files --------------------------------------------------------------------------

FILE_LIST = "manifiesto.csv"
"""Phase 1: one line per written file, in chronological order."""

REJECTED_LIST = "rechazados.csv"
"""Phases 1 and 2: what was left out, and why."""

MANIFEST = "manifiesto.json"
"""Phase 2: with what the dataset was made; its presence means "complete"."""

DATASET_X, DATASET_Y, DATASET_ROWS = (
    "dataset_X.npy",
    "dataset_y.npy",
    "dataset_filas.csv",
)
"""Phase 2: float32 (n_rows, n_features); str (n_rows,); one line per row."""

DATASET_IMAGES, DATASET_PIXELS = "dataset_imagenes.csv", "dataset_pixeles.npy"
"""Phase 2: one line per image; float32 (n_images, 40). In the order of first rows."""

JOURNAL_DIR = "descripciones"
"""Phases 2 and 4: one append-only JSON Lines file of answers per image."""

CLASSIFIER, SCALER = "clasificador_svc.joblib", "escalador.joblib"
"""Phase 3: scikit-learn objects that load with scikit-learn and numpy alone."""

THUMBNAIL_DIR = "miniaturas"
"""Phase 2: one JPEG per image, by its id, for the pages of phases 3 and 4."""

SHEET, SHEET_THUMBNAILS = "vista_previa.html", ".miniaturas"
"""Phase 1: the page to label from, and one JPEG per written file."""

REPORT = "informe.html"
"""Phase 3: all that the console says, with the training images."""

CONFUSION_MATRIX, METRICS = "matriz_de_confusion.png", "metricas.json"
"""Phase 3: the figure, and the figures; METRICS is written last."""

SECOND_READER = "segundo_lector.joblib"
"""Phase 3: scikit-learn pipeline of the second reader."""

NEIGHBOURS = "vecinos.npz"
"""Phase 3: generic training rows, scaled, that tell known images from strangers."""

# --- Image preparation: decoded pixels -> what the VLM sees -------------------------

PREPARATION_VERSION = 2
"""Raise it when the code of the preparation changes what it sends."""

IMAGE_SIDE_PX = 336
"""Input side of llava-phi3's vision encoder (CLIP ViT-L/14-336)."""

WINDOW_PERCENTILES = (0.5, 99.5)
"""Grey window: percentiles of the image, since it may use a sliver of its range."""

WINDOW_MIN_NOISE_SDS = 40.0
"""The window is never narrower than this many noise SDs of the reduced image.

Without it the noise of a flat field fills the grey range and is described as an object.
"""

PADDING_GREY = 116
"""Grey level beside images that are not square (llava-1.5 pads with 122, 116, 104)."""

# --- Prompts ------------------------------------------------------------------------
# No prompt names a class, a folder or a file. The differentiated sets differ in what
# they ask; the generic set is the one that phase 4 can ask of an unknown image.

OBJECT_PROMPTS = (
    "Describe the object in this X-ray image: its outline, its edges and its details.",
    "What shapes do you see in this radiograph? Name each shape and where it lies.",
    "Describe every straight edge in this X-ray image and how it is tilted.",
    "Are there circles, discs or rings in this radiograph? Say how many and where.",
    "Describe the borders between bright and dark areas of this X-ray image.",
    "Is there a pattern of parallel bars or lines here? Describe it and its position.",
    "Describe the largest object in this radiograph: shape, size and brightness.",
    "Describe the smallest details that you can make out in this X-ray image.",
    "How is the object in this radiograph arranged? Describe its layout.",
    "Which parts of this X-ray image are brightest and which darkest? What are they?",
    "Describe the contrast between the object and its background in this radiograph.",
    "Count the separate details in this X-ray image and describe how they are grouped.",
    "Describe what lies in the centre of this radiograph and what lies around it.",
    "Describe the symmetry of the object in this X-ray image.",
    "How much of this radiograph does the object cover, and where does it end?",
    "Describe this X-ray test object to somebody who can't see it.",
    "Describe the texture inside and outside the object in this X-ray image.",
    "Is the transition at the edges of this object sharp or gradual? Describe it.",
    "Go through this radiograph from left to right and describe what appears.",
    "Go through this X-ray image from top to bottom and describe what appears.",
)
"""Asked of images with an object in the beam: every class not named as background."""

BACKGROUND_PROMPTS = (
    "Describe how uniform the brightness of this X-ray image is.",
    "Does the brightness of this radiograph change from one side to the other? How?",
    "Describe the texture and the noise of this X-ray image.",
    "Compare the corners of this radiograph with its centre.",
    "Are there lines, bands or stripes in this X-ray image? Describe them.",
    "Describe the borders of this radiograph and anything that you see there.",
    "Is anything at all visible in this X-ray image apart from an even grey?",
    "Describe the grey levels of this radiograph and how they are distributed.",
    "Describe any spots, dots or blemishes in this X-ray image.",
    "Is the illumination of this radiograph even? Describe where it is not.",
    "Describe the gradient of brightness in this X-ray image, if there is one.",
    "Describe the overall appearance of this empty radiograph.",
    "How smooth or grainy is this X-ray image? Describe it in two sentences.",
    "Describe the brightest and the darkest region of this radiograph.",
    "Are there blocks or tiles of different brightness in this X-ray image?",
    "Describe the left half and the right half of this radiograph.",
    "Describe the upper half and the lower half of this X-ray image.",
    "Is there any structure in this radiograph? Say how faint or strong it is.",
    "Describe the contrast of this X-ray image.",
    "Describe this radiograph to somebody who can't see it.",
)
"""Asked of images of the background classes."""

GENERIC_PROMPTS = (
    "Describe this X-ray image in detail.",
    "What do you see in this radiograph?",
    "Describe the content of this X-ray image: shapes, edges, brightness and texture.",
    "Is there an object in this radiograph? Describe what the image shows.",
    "Describe the layout of this X-ray image from the centre to the borders.",
    "Summarise in three sentences what is visible in this radiograph.",
    "Describe the main visual features of this X-ray image.",
    "What stands out in this radiograph, and what is its background like?",
    "Describe this X-ray image as precisely as you can, without naming its purpose.",
    "List what can be seen in this radiograph: structures, patterns and uniformity.",
)
"""Asked of every training image and, in phase 4, of every new image."""

PROMPT_SETS = {
    "object": OBJECT_PROMPTS,
    "background": BACKGROUND_PROMPTS,
    "generic": GENERIC_PROMPTS,
}
"""The names under which `dataset_filas.csv` files each prompt."""

BREVITY = "Answer in two or three short sentences."
"""Ends every prompt, so that answers fit into the tokens that they may have."""

EMBED_PREFIXES = {
    "nomic-embed-text": "classification: ",
    "nomic-embed-text-v1": "classification: ",
    "nomic-embed-text-v1.5": "classification: ",
    "embeddinggemma": "task: classification | query: ",
}
"""What the makers of an embedder ask to stand before every text (its model card).

Keys are names as Ollama has them, without registry, owner and tag; others get nothing.
"""

PROBE_SENTENCE = "A radiograph of a uniform grey field without any object."
"""Embedded by phases 2 and 4: a changed embedding means another embedder."""

# --- Knobs --------------------------------------------------------------------------

ALL_PHASES = (1, 2, 3, 4)
VLM_PHASES = (2, 4)

GO_DURATION = re.compile(r"-?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+|-?\d+(\.\d+)?")
"""What Ollama takes as keep_alive: a duration of Go such as 1h30m, or seconds."""


def _knob(
    default: Any,
    help_text: str,
    *phases: int,
    flag: str = "",
    choices: Sequence[str] | None = None,
    **limits: float,
) -> Any:
    """A field that knows the phases that show it as a flag, and its limits.

    `limits` are `least` and `most` (inclusive) and `above` (exclusive).
    """
    metadata = {
        **{"help": help_text, "phases": phases, "flag": flag},
        **{"choices": choices, "limits": limits},
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of all phases; each field is a flag of the phases that it names."""

    base: Path = _knob(Path(), "folder that holds the data folders", *ALL_PHASES)
    input_dir: Path = _knob(Path("input_dicom"), "folder of the user's DICOM files", 1)
    decompressed_dir: Path = _knob(
        Path("f1_descomprimidos"), "folder of the decompressed files", 1
    )
    labelled_dir: Path = _knob(
        Path("datos_etiquetados"), "folder with one subfolder per class", 1, 2
    )
    dataset_dir: Path = _knob(
        Path("dataset_final_vlm"), "folder of the vectors and journal", *ALL_PHASES
    )
    model_dir: Path = _knob(Path("modelo_final_vlm"), "folder of the model", 3, 4)

    host: str = _knob(
        "",
        "address of the Ollama server, or of several: A,B,C (default: OLLAMA_HOST, "
        "else http://127.0.0.1:11434)",
        *VLM_PHASES,
    )
    any_host: bool = _knob(
        False, "go on without the servers that the preflight refuses", *VLM_PHASES
    )
    dask: str = _knob(
        "",
        "address of a Dask scheduler whose workers ask their own OLLAMA_HOST, or "
        "local:N for N workers here",
        *VLM_PHASES,
    )
    vlm: str = _knob("llava-phi3", "vision language model that describes", *VLM_PHASES)
    embed_model: str = _knob(
        "nomic-embed-text", "model that turns descriptions into vectors", *VLM_PHASES
    )
    server_parallel: int = _knob(
        1,
        "the server's OLLAMA_NUM_PARALLEL: images described at once",
        *VLM_PHASES,
        least=1,
    )
    concurrency: int = _knob(
        0,
        "requests in flight at once to a server; 0 means --server-parallel + 1, with "
        "--dask + 2",
        *VLM_PHASES,
        least=0,
    )
    pull: bool = _knob(False, "download missing models first", *VLM_PHASES)
    wait: float = _knob(
        600.0,
        "seconds to wait for a server that stopped answering",
        *VLM_PHASES,
        least=0,
        most=1e6,
    )
    temperature: float = _knob(
        0.7, "sampling temperature of the VLM", *VLM_PHASES, least=0, most=100
    )
    num_predict: int = _knob(
        160, "tokens that a description may have", *VLM_PHASES, least=1
    )
    num_ctx: int = _knob(
        2048, "context length asked of the VLM, tokens", *VLM_PHASES, least=1
    )
    keep_alive: str = _knob(
        "30m", "how long the server keeps models: 30m, seconds, or -1", *VLM_PHASES
    )

    jobs: int = _knob(0, "worker processes; 0 means one per core", 1, least=0)
    max_image_mb: int = _knob(
        2048, "reject images that would decode to more megabytes than this", 1, least=1
    )
    item_timeout_s: float = _knob(
        10.0,
        "give up on a file after this many seconds, times 1 + its decoded size / 16 MB",
        1,
        above=0,
        most=1e6,
    )

    labels: tuple[Path, ...] = _knob(
        (), "move what these lists, saved from a page, name into class folders; end", 1
    )
    dry_run: bool = _knob(False, "only show what --labels would do", 1)

    no_sight_test: bool = _knob(
        False, "don't test whether the server looks at the pictures", *VLM_PHASES
    )
    sight_test_only: bool = _knob(
        False, "run that test alone and print every distance", *VLM_PHASES
    )
    descriptions: int = _knob(50, "descriptions per labelled image", 2, least=1)
    generic_share: float = _knob(
        0.2,
        "share of the descriptions asked with the generic prompts, 0 to 1",
        2,
        least=0,
        most=1,
    )
    estimate: bool = _knob(
        False, "ask a few descriptions, print the expected duration and stop", 2
    )
    finished_only: bool = _knob(
        False, "ask nothing: write the dataset of the images that are complete", 2
    )

    group_by: str = _knob(
        "image",
        "what must not be on both sides of a split",
        3,
        choices=("image", "detector", "station", "day", "study"),
    )
    search: str = _knob(
        "none", "hyper-parameter search", 3, choices=("none", "short", "full")
    )
    seed: int = _knob(0, "seed of folds and projections", 3, least=0, most=2**32 - 1)
    folds: int = _knob(5, "folds of the cross-validation", 3, least=2)
    kernel: str = _knob("linear", "kernel of the SVC", 3, choices=("linear", "rbf"))
    c: float = _knob(0.01, "penalty C of the SVC", 3, above=0, most=1e9)
    max_error: float = _knob(
        0.05, "share of errors aimed at among the answered images", 3, least=0, most=1
    )
    known_refused: float = _knob(
        0.05, "share of known images that may seem new, 0 to 1", 3, least=0, most=1
    )

    inference_descriptions: int = _knob(
        10, "generic descriptions per new image", 3, 4, flag="descriptions", least=1
    )
    json: bool = _knob(False, "print one JSON object per image", 4)
    csv: Path | None = _knob(None, "also write the results to this CSV file", 4)
    html: Path | None = _knob(
        None, "also write a page with the pictures to this HTML file", 4
    )
    copy_to: Path | None = _knob(
        None, "copy every image into a folder of its class below this one", 4
    )
    one_reader: bool = _knob(False, "decide by the descriptions alone", 4)
    any_modality: bool = _knob(
        False, "don't refuse a Modality that training does not have", 4
    )
    ask_all: bool = _knob(
        False, "ask all questions, also where they are not needed to decide", 4
    )
    force: bool = _knob(
        False, "answer although model and server no longer match; says so", 4
    )

    verbose: bool = _knob(False, "say more about every item", *ALL_PHASES)
    quiet: bool = _knob(False, "say nothing but results and errors", *ALL_PHASES)

    def folder(self, name: str) -> Path:
        """The path of the folder field `name`, below the base directory."""
        return self.base / Path(getattr(self, name))

    @property
    def log_level(self) -> int:
        """Level for `logging`: --quiet leaves warnings and errors."""
        if self.quiet:
            return logging.WARNING
        return logging.DEBUG if self.verbose else logging.INFO

    @property
    def host_url(self) -> str:
        """Address of the Ollama server: --host, else OLLAMA_HOST, else the default."""
        return self.host or os.environ.get("OLLAMA_HOST") or "http://127.0.0.1:11434"

    def one_per_host(self) -> list["Config"]:
        """These knobs once for each server that --host or OLLAMA_HOST names."""
        hosts = [host for host in self.host_url.split(",") if host.strip()]
        return [replace(self, host=host.strip()) for host in hosts or [self.host_url]]

    @property
    def in_flight(self) -> int:
        """Bound of the semaphore: requests in flight at once."""
        # By Dask the next question is longer on its way: one more stands in the queue.
        return self.concurrency or self.server_parallel + (2 if self.dask else 1)


GROUPS = {"base": "folders", "host": "server and models", "jobs": "this phase"}
GROUPS |= {"verbose": "output"}
"""The field that begins each group of `--help`, and the group's title."""


def parse_config(
    phase: int,
    documentation: str,
    argv: Sequence[str] | None = None,
    positional: tuple[str, str] | None = None,
) -> tuple[Config, list[Path]]:
    """Read the flags of one phase from the command line.

    Parameters
    ----------
    phase : int
        1 to 4: only the fields that name this phase become flags.
    documentation : str
        The script's docstring, shown by ``--help``.
    argv : sequence of str, optional
        Arguments without the program name; the process's own by default.
    positional : (name, help), optional
        Accept paths under this name.

    Returns
    -------
    (Config, list of Path)
        The knobs, and the positional paths (empty without `positional`).

    Raises
    ------
    SystemExit
        With code 2 on an unknown flag or a bad value, 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=PROGRAM_VERSION)
    if positional:
        name, help_text = positional
        parser.add_argument("paths", nargs="*", type=Path, metavar=name, help=help_text)
    group = parser.add_argument_group("")
    for knob in fields(Config):
        if knob.name in GROUPS:
            group = parser.add_argument_group(GROUPS[knob.name])
        if phase in knob.metadata["phases"]:
            _add_flag(group, knob)
    values = vars(parser.parse_args(argv))
    paths = values.pop("paths", [])
    return Config(**values), paths


def _add_flag(group: Any, knob: Field[Any]) -> None:
    flag = "--" + (knob.metadata["flag"] or knob.name).replace("_", "-")
    help_text = knob.metadata["help"].replace("%", "%%")
    if isinstance(knob.default, bool):
        group.add_argument(flag, dest=knob.name, action="store_true", help=help_text)
        return
    default: Any = knob.default
    shown = "" if default in (None, "", ()) else f" (default: {default})"
    choices = knob.metadata["choices"]
    group.add_argument(
        flag,
        dest=knob.name,
        nargs="+" if default == () else None,
        type=_reader(knob),
        default=knob.default,
        choices=choices,
        metavar=None if choices else knob.name.upper(),
        help=help_text + shown,
    )


def _reader(knob: Field[Any]) -> Callable[[str], Any]:
    """Turns a flag's text into its value; argparse names the flag where it can't."""
    if knob.name == "keep_alive":
        return _duration
    if knob.name == "dask":
        return _scheduler
    if knob.default in (None, ()) or isinstance(knob.default, Path):
        return Path
    kind: Any = type(knob.default)
    limits = knob.metadata["limits"]

    def read(text: str) -> Any:
        value = kind(text)
        if "least" in limits and not value >= limits["least"]:  # NaN, too
            raise argparse.ArgumentTypeError(f"must be at least {limits['least']:g}")
        if "above" in limits and not value > limits["above"]:
            raise argparse.ArgumentTypeError(f"must be above {limits['above']:g}")
        if "most" in limits and not value <= limits["most"]:
            raise argparse.ArgumentTypeError(f"must be at most {limits['most']:.10g}")
        return value

    read.__name__ = {"int": "whole number", "float": "number"}.get(
        kind.__name__, kind.__name__
    )
    return read


def _duration(text: str) -> str:
    if not GO_DURATION.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a duration: write 30m, 1h30m, a number of seconds or -1"
        )
    return text


def _scheduler(text: str) -> str:
    if text and not re.fullmatch(
        r"local:[1-9]\d*|(tcp|tls|ucx|wss?)://\S+|[^\s:/]+:\d+", text
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no scheduler: write tcp://name:8786, tls://name:8786 or "
            "local:2"
        )
    return text
