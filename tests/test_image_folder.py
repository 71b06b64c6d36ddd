"""Folders of images, one per class, and their prompts."""

import pytest

from datasets.image_folder import ImageFolder
from tests.test_zero_shot import folders
from utils.cli import UserError


def test_captions_are_the_prompts_of_all_classes_and_right_for_all_images_of_theirs(tmp_path):
    folders(tmp_path)
    (tmp_path / "val" / "dog" / "notes.txt").write_text("x")
    (tmp_path / "val" / ".cache").mkdir()
    (tmp_path / "val" / "dog" / "._0.png").write_bytes(b"x")
    (tmp_path / "t.txt").write_text("{}\nan image of a {}\n")
    split = ImageFolder(tmp_path, "val", templates=tmp_path / "t.txt")
    assert split.captions == ["a cat", "an image of a a cat", "dog", "an image of a dog"]
    assert split.relevance == [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2
    assert split.image_names[3] == "dog/0.png"
    (tmp_path / "classes.txt").write_text("a_cat\tkitten\ndog\tpuppy\nbird\tbird\n")
    named = ImageFolder(tmp_path, "val", templates=tmp_path / "t.txt")
    assert named.captions[::2] == ["kitten", "puppy"]
    left = named.without({0, 1})
    assert (left.captions, left.relevance) == (named.captions, [[0]] * 2 + [[1, 2, 3]] * 2)
    with pytest.raises(UserError, match="no image of the class of 'kitten' can be read"):
        named.without({0, 1, 2})


def same_names(root):
    (root / "classes.txt").write_text("a_cat\tdog\n")


def empty_class(root):
    (root / "val" / "bird").mkdir()


def one_class(root):
    for image in (root / "val" / "dog").iterdir():
        image.unlink()
    (root / "val" / "dog").rmdir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (same_names, "are both named 'dog'"),
        (empty_class, "bird: no image"),
        (one_class, "at least two"),
        (lambda root: (root / "classes.txt").write_text("a_cat kitten\n"), "folder, tab and name"),
        (lambda root: (root / "t.txt").write_text("{}\na photo\n"), r"'a photo' has no \{\}"),
        (lambda root: (root / "t.txt").write_text("\n"), "holds no template"),
    ],
)
def test_wrong_folders_and_templates_are_named(tmp_path, change, words):
    folders(tmp_path)
    (tmp_path / "t.txt").write_text("{}\n")
    change(tmp_path)
    with pytest.raises(UserError, match=words):
        ImageFolder(tmp_path, "val", templates=tmp_path / "t.txt")
