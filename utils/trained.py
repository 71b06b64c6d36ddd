"""The trained heads of a data set: how they were trained, and whether they belong together."""

import logging
from dataclasses import asdict
from pathlib import Path

from models import METHODS, TAG, untagged
from utils.checkpoint import UNVALIDATED, checkpoint_path, load_adaptor, lock_path
from utils.cli import UserError, need
from utils.device import pick_device, pick_precision, precision_name
from utils.files import is_locked, load_tensors
from utils.preprocess import ClipId

# Fields of a recipe that train.py has a flag for, and those of them that `training_command` also
# copies from a checkpoint of another method.
RECIPE_FLAGS = ("epochs", "batch_size", "optimizer", "lr", "weight_decay")
FLAGS_FOR_ALL_METHODS = ("epochs", "batch_size")


def load_adaptors(dataset, methods, seeds, cache, other_clip):
    """The trained adaptors of a data set: {(method, seed): Adaptor}.

    Args:
        dataset: the name of their folder in checkpoints/.
        methods: names of methods, with or without a tag.
        seeds: seeds of the training.
        cache: EmbeddingCache that they are to be used on, on the device they are loaded to.
        other_clip: accept adaptors that were trained on embeddings of another CLIP.
    Raises: UserError if one is missing or does not fit the cache, or if seeds of a method were
        trained differently.
    """
    adaptors = {}
    for method in methods:
        for seed in seeds:
            path = checkpoint_path(dataset, seed, method)
            check_exists(path, dataset, method, seed)
            adaptor = load_adaptor(path, cache.device, untagged(method))
            check_fits(adaptor, path, cache, other_clip)
            adaptors[method, seed] = adaptor
        check_trained_alike(dataset, method, {seed: adaptors[method, seed] for seed in seeds})
    return adaptors


def check_exists(path, dataset, method, seed):
    """Raise a UserError if there is no checkpoint; note it if a later training is unfinished."""
    state = path.with_suffix(".resume.pt")
    is_training = is_locked(lock_path(path))
    is_interrupted = state.exists()
    if not is_training and not is_interrupted:
        command = training_command(dataset, method, seed)
        problem = f"{path}: no such checkpoint; make it with {command}"
        need(path.exists(), problem + _other_choice(path, method))
        return
    if is_training:
        problem = "it is being trained"
        cure = "wait until training ends"
    else:
        problem = f"its training was interrupted; the progress is saved in {state}"
        cure = "finish it with the command that began it and --resume"
    need(path.exists(), f"{path}: no such checkpoint yet, {problem}; {cure}")
    logging.warning("note: %s is from an earlier training run: %s; %s", path, problem, cure)


def _other_choice(path, method):
    """What may be meant instead of a missing checkpoint, to end a message; "" if nothing."""
    tagged_names = sorted(file.stem for file in path.parent.glob(f"{untagged(method)}{TAG}*.pt"))
    tagged_names = [name for name in tagged_names if "." not in name]  # no unfinished training
    if tagged_names:
        return f", or take --method {tagged_names[0]}, which is there"
    elsewhere = sorted(Path("checkpoints").glob(f"*/{path.parent.name}/{path.name}"))
    if elsewhere:
        return f", or evaluate that of another data set with --trained-on {elsewhere[0].parts[1]}"
    return ""


def check_fits(adaptor, path, cache, other_clip=False):
    """Check that an adaptor is for the embeddings of a cache. Note it if their CLIPs are unknown.

    Args: other_clip: accept an adaptor that was trained on embeddings of another CLIP.
    Raises: UserError if it is not.
    """
    need(
        adaptor.embed_dim == cache.embed_dim,
        f"{path}: trained on embeddings {adaptor.embed_dim} wide, those of {cache.folder} are "
        f"{cache.embed_dim} wide; train again",
    )
    trained_on = ClipId.of_meta(adaptor.config.get("clip"))
    if not trained_on.pretrained or not cache.clip_id.pretrained:
        logging.warning(
            "note: nothing says whether %s was trained on the CLIP of %s", path, cache.folder
        )
        return
    need(
        other_clip or not trained_on.contradicts(cache.clip_id),
        f"{path}: trained on embeddings of {trained_on.readable()}, those of {cache.folder} are "
        f"of {cache.clip_id.readable()}; train again, or use it anyway with --other-clip",
    )


def settings_of(adaptor):
    """The settings that a head was trained with besides its seed: {name: value}; {} if unknown."""
    if not adaptor.config:
        return {}
    settings = {**UNVALIDATED, **adaptor.config, **adaptor.recipe}
    settings["recipe"] = adaptor.config.get("recipe")
    settings.pop("seed", None)
    return settings


def training_of(adaptor):
    """How a head was trained, for the results: recipe, epochs, and all settings; {} if unknown.

    "planned_epochs": the epochs of the recipe, given only if fewer were trained.
    """
    config = getattr(adaptor, "config", {})
    recipe = getattr(adaptor, "recipe", {})
    if "recipe" not in config or "epochs" not in recipe:
        return {}
    training = {"recipe": config["recipe"], "epochs": recipe["epochs"]}
    planned = getattr(adaptor, "recipes", {}).get(config["recipe"])
    if planned is not None:
        planned_epochs = planned.fitted_to(config.get("captions", 1)).epochs
        if planned_epochs > recipe["epochs"]:
            training["planned_epochs"] = planned_epochs
    return {**training, "training": settings_of(adaptor)}


def check_trained_alike(dataset, method, adaptors):
    """Raise a UserError if the seeds of a method, {seed: Adaptor}, were trained differently."""
    first_seed, *other_seeds = adaptors
    expected = settings_of(adaptors[first_seed])
    for seed in other_seeds:
        changed = difference_of_settings(expected, settings_of(adaptors[seed]))
        if changed:
            path = checkpoint_path(dataset, seed, method)
            command = training_command(dataset, method, seed, like=first_seed)
            raise UserError(
                f"{path}: not trained as seed {first_seed} was ({changed}), so their mean says "
                f"nothing; train it again with {command} --overwrite, or leave it out of --seed"
            )


def difference_of_settings(expected, settings):
    """How settings differ: "epochs is 1, not 2; ...". What only one of them names does not count.

    Older files lack newer settings.
    """
    changes = []
    for name in sorted(expected.keys() & settings.keys()):
        if name == "clip":  # older files lack checksums; `check_fits` compares CLIPs
            continue
        if settings[name] != expected[name]:
            changes.append(f"{name} is {settings[name]}, not {expected[name]}")
    return "; ".join(changes)


def training_command(dataset, method, seed, like=None):
    """The command that trains a head as the other seeds or methods of the data set were trained.

    Args:
        like: the seed of the same method to follow; None: whatever is found first.
    """
    base, _, tag = method.partition(TAG)
    command = f"python train.py --dataset {dataset} --method {base} --seed {seed}"
    if tag:
        command += f" --tag {tag}"
    content = _similar_checkpoint(dataset, method, like)
    if content is None:
        return command
    config = content["config"]
    recipe_name = config.get("recipe", "paper")
    if recipe_name != "paper":
        command += f" --recipe {recipe_name}"
    is_same_method = content["method"] == base
    recipe = METHODS[content["method"]].recipes[recipe_name].fitted_to(config.get("captions", 1))
    for field in RECIPE_FLAGS if is_same_method else FLAGS_FOR_ALL_METHODS:
        value = content["recipe"].get(field)
        if value != asdict(recipe)[field]:
            command += f" --{field.replace('_', '-')} {value}"
    if config.get("validation"):
        command += f" --validation {config['validation']:g}"
    if config.get("keep") == "best":
        command += " --keep best"
    if "shuffle_buffer" in config:
        command += f" --shuffle-buffer {config['shuffle_buffer']}"
    device = pick_device("auto")
    is_other_device = config.get("device", device.type) != device.type
    if is_other_device:
        command += f" --device {config['device']}"
    precision = precision_name(pick_precision("auto", device))
    if is_other_device or config.get("precision", precision) != precision:
        command += f" --precision {config.get('precision', precision)}"
    return command


def _similar_checkpoint(dataset, method, like=None):
    """The content of a checkpoint whose recipe a method could have, or None.

    The first choice is one with the same method and tag, then any with the same tag, then any
    without a tag.
    """
    folder = Path("checkpoints", dataset)
    paths = sorted(folder.glob(f"*/{method}.pt"))
    if like is not None:
        paths = [checkpoint_path(dataset, like, method)]
    finished = [path for path in sorted(folder.glob("*/*.pt")) if path.suffixes == [".pt"]]
    for tag in dict.fromkeys((method.partition(TAG)[2], "")):
        paths += [path for path in finished if path.stem.partition(TAG)[2] == tag]
    for path in paths:
        try:
            content = load_tensors(path, check_sums=False)
        except (UserError, OSError):
            continue
        has_settings = isinstance(content, dict) and all(
            isinstance(content.get(key), dict) for key in ("config", "recipe")
        )
        if not has_settings or content.get("method") not in METHODS:
            continue
        recipe_name = content["config"].get("recipe")
        methods = (untagged(method), content["method"])
        if all(recipe_name in getattr(METHODS[name], "recipes", {}) for name in methods):
            return content
    return None
