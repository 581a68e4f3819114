"""Whether the files of a reward are there, before any is read."""

import shutil
from pathlib import Path

import pytest

from marval.models.clip import Clip
from marval.reward_files import check_files

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, as `CLIPModel` and `CLIPProcessor` of transformers 5 write it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    path = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = transformers.CLIPConfig(
        text_config={**small, **ends, "vocab_size": len(words)}, projection_dim=4,
        vision_config={**small, "image_size": 30, "patch_size": 6},
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(path)
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    images = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


def test_a_clip_with_the_processor_of_transformers_5_is_whole(folder: Path, tmp_path: Path):
    assert (folder / "processor_config.json").is_file()
    assert not (folder / "preprocessor_config.json").exists()
    check_files(f"clip:{folder}", "")
    assert Clip.load(str(folder), "cpu").size == 30
    for name, said in (("processor_config.json", "preprocessor_config.json"), ("config.json", "config.json")):
        out = tmp_path / name
        shutil.copytree(folder, out)
        (out / name).unlink()
        with pytest.raises(ValueError, match=f"{out} holds no whole CLIP: {said} is missing"):
            check_files(f"clip:{out}", "")


@pytest.mark.parametrize("name", ["weights/HPS_v2.1.pt", "weights.safetensors"])
def test_a_missing_file_is_no_hub_name(name: str):
    for kind in ("hps", "imagereward"):
        with pytest.raises(ValueError, match=f"^reward '{kind}:{name}': {name} does not exist$"):
            check_files(f"{kind}:{name}", "")
