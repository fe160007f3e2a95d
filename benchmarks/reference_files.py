"""The files with the original implementation's inputs, outputs, names and shapes."""

import dataclasses
import json
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import reference_weights
from benchmarks.reference_weights import ReferenceNetwork
from instanas_jax import policy
from instanas_jax.errors import InputError
from instanas_jax.search_space import SupernetSpec, preset

# By the names that the files give to the three networks.
SPECS: dict[str, SupernetSpec] = {
    "c100": preset("px32", num_classes=100),
    "tiny": preset("px64", num_classes=200),
    "imagenet": preset("px224", num_classes=1000),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The original's arrays and its manifest.

    A method raises InputError where a file does not hold what it should.
    """

    arrays: Mapping[str, np.ndarray]
    manifest: Mapping[str, Any]

    def array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise InputError(f"the reference has no array '{name}'")
        return self.arrays[name]

    def norms(self, name: str) -> dict[str, float]:
        """Norms by tensor, of those tensors that take part in the computation."""
        norms = self.manifest.get(name)
        if not isinstance(norms, dict):
            raise InputError(f"the manifest has no '{name}'")
        return {
            tensor: float(norm)
            for tensor, norm in norms.items()
            if not reference_weights.is_unused(tensor)
        }

    def images(self, network: str) -> np.ndarray:
        """[B, H, W, 3] float32."""
        size = SPECS[network].image_size
        if network == "imagenet":
            seed = self.manifest.get("imagenet_images_seed")
            if not isinstance(seed, int):
                raise InputError(f"the manifest's imagenet_images_seed is {seed!r}, not a number")
            count = len(self.masks(network))
            images = np.random.default_rng(seed).standard_normal((count, 3, size, size))
        else:
            images = self.array(f"{network}_images")
        if images.shape[1:] != (3, size, size):
            raise InputError(
                f"{network}_images of shape {list(images.shape)}: expected [B, 3, {size}, {size}]"
            )
        return images.transpose(0, 2, 3, 1).astype(np.float32)

    def masks(self, network: str) -> np.ndarray:
        """[B, L, O] float32."""
        masks = self.array(f"{network}_masks")
        return policy.validate_mask(masks, SPECS[network].mask_shape)

    def shapes(self, network: str) -> dict[str, reference_weights.Shape]:
        """Shapes by state-dict name of one network of the manifest."""
        if network not in self.manifest:
            raise InputError(f"the manifest has no '{network}'")
        try:
            entries = [
                (str(name), tuple(map(int, shape))) for name, shape in self.manifest[network]
            ]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the manifest's '{network}' is not a list of [name, shape]: {error}"
            ) from error
        return dict(entries)

    @property
    def weight_prefix(self) -> str:
        """What stands before a tensor's name in its seed."""
        prefix = self.manifest.get("weight_name_prefix")
        if not isinstance(prefix, str):
            raise InputError(f"the manifest's weight_name_prefix is {prefix!r}, not a string")
        return prefix

    def supernet(self, name: str) -> tuple[ReferenceNetwork, dict[str, Any]]:
        """The supernet's layers and its weights, laid out as ours."""
        shapes = self.shapes(f"supernet_{name}")
        network = reference_weights.supernet_layers(SPECS[name], shapes)
        return network, reference_weights.convert(network, shapes, prefix=self.weight_prefix)

    def controller(self, name: str) -> dict[str, Any]:
        """The controller's weights, laid out as ours."""
        shapes = self.shapes(f"controller_{name}")
        network = reference_weights.controller_layers(SPECS[name])
        return reference_weights.convert(network, shapes, prefix=self.weight_prefix)


def load(reference_path: str, manifest_path: str) -> Reference:
    """Reads both files whole.

    Raises:
      InputError: one is missing or is not what it should be.
    """
    try:
        with np.load(reference_path) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise InputError(f"cannot read {reference_path}: {error.strerror or error}") from error
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as e:
        # numpy.load returns a bare array, without `files`, for a .npy file.
        raise InputError(f"{reference_path} is not an .npz file of plain arrays: {e}") from e
    try:
        manifest = json.loads(pathlib.Path(manifest_path).read_text())
    except OSError as error:
        raise InputError(f"cannot read {manifest_path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{manifest_path} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{manifest_path} holds a {type(manifest).__name__}, not a JSON object")
    return Reference(arrays, manifest)
