"""GGUF files become checkpoint folders once, through transformers' own reader. It knows no hub and no index.

The weights are dequantised. They are stored in 16 bits unless the file itself holds float32 matrices or values beyond
float16: a quantised GGUF's scales are float16, so nothing that the file knew is lost.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage.errors import InvalidInput, NotFound, Unavailable
from .base import FetchContext, FetchProgress, ModelSource

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"


class GgufSource(ModelSource):
    def fetch(self, location: str, context: FetchContext) -> Path:
        file = Path(location)
        source = gguf_identity(location)
        with context.cache.lock(source, on_wait=lambda: context.progress(waiting(file.name))) as found:
            # A file in a hub's cache comes here without anybody having looked for what was made of it before.
            found = found or context.cache.find(source)
            if found is not None:
                return found
            built = convert_gguf(file, context.cache.partial(source) / "checkpoint", context)
            return context.cache.install(source, built)


def gguf_identity(location: str) -> str:
    """The file's path with size and time of change: a changed file is another source. Raises NotFound."""
    try:
        facts = Path(location).stat()
    except OSError as error:
        raise NotFound(f"The GGUF file {location} cannot be read: {error.strerror}.", param="source") from error
    return f"{location}?size={facts.st_size}&mtime={facts.st_mtime_ns}"


def waiting(what: str) -> FetchProgress:
    return FetchProgress(message=f"Waiting for another process that fetches {what}")


def convert_gguf(file: Path, dest: Path, context: FetchContext) -> Path:
    """Write the checkpoint folder `dest` from a GGUF file. Imports torch: call it in a process that ends soon.

    Raises InvalidInput if it is no GGUF file, Unavailable if the checkpoint cannot be written.
    """
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise InvalidInput(f"{file} is not a GGUF file: it does not begin with 'GGUF'.", param="source")
    context.progress(FetchProgress(message=f"Converting {file.name} to safetensors (once)"))
    import gguf
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers reads the whole header anew for the configuration, the weights and the tokenizer, and makes the map
    # of tensor names anew for each module: remembering both saves half of the time.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.to(_stored_dtype(gguf.GGUFReader(str(file)), model))
    try:
        model.save_pretrained(dest)
    except SafetensorError as error:  # its form of every OSError
        raise Unavailable(f"{file.name} was converted, but could not be written to {dest}: {error}.") from error
    tokenizer.save_pretrained(dest)
    return dest


def _stored_dtype(reader: Any, model: "torch.nn.Module") -> "torch.dtype":
    import torch
    from gguf import GGMLQuantizationType

    kinds = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
    if kinds == {GGMLQuantizationType.BF16}:
        return torch.bfloat16
    if GGMLQuantizationType.F32 in kinds:
        return torch.float32
    limit = torch.finfo(torch.float16).max
    extremes = (torch.aminmax(parameter.detach()) for parameter in model.parameters())
    return torch.float16 if all(-limit <= low and high <= limit for low, high in extremes) else torch.float32
