"""Verbs of huggingface_hub's mixin on a model, with the meaning of medmim's functions: strict, verified, no pickle.

The mixin itself is not inherited: by default it loads leniently, which gives random numbers for weights without an
error, reads pickles, and does not say in the config which architecture was saved.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, Self


class Shareable:
    """Gives a model `save_pretrained`, `push_to_hub` and `from_pretrained`.

    medmim is imported when one of them is called: models know nothing of where weights come from.
    """

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> Any:
        """Writes a model folder; see `medmim.save_pretrained`, also for the arguments.

        Args:
            save_directory: Where to.
            **kwargs: `decoder` and `weights`.

        Returns:
            The spec that was written.
        """
        import medmim

        return medmim.save_pretrained(self, save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publishes the model; see `medmim.push_to_hub`, also for the arguments.

        Args:
            repo_id: "org/name".
            **kwargs: Such as `private`, `token`, `create_pr` and `commit_message`.

        Returns:
            What was published.
        """
        import medmim

        return medmim.push_to_hub(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Self:
        """Loads a model of this class; see `medmim.from_pretrained`, also for the arguments.

        Args:
            pretrained_model_name_or_path: A folder that exists, or "org/name".
            **kwargs: `revision`, `token`, `cache_dir`, `endpoint`, `local_files_only`, `device`, `dtype`, and
                constructor arguments that differ from the saved ones.

        Returns:
            The model, in evaluation mode.

        Raises:
            WeightsError: For a model of another class, and for all that `medmim.from_pretrained` refuses.
        """
        import medmim

        model = medmim.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if not isinstance(model, cls):
            raise medmim.WeightsError(
                f"{pretrained_model_name_or_path} holds a {type(model).__name__}, not a {cls.__name__}; "
                "medmim.from_pretrained loads either"
            )
        return model
