"""The guard in other people's training frameworks, a few lines each.

Importing this room needs none of them: each has a file of its own, and one that is missing is one line.
May import `training` and the rooms below it. Public: `after_save.restore_after_save`, `settings.checked`,
`settings.from_environment`, `frameworks.find_framework`, `llamafactory.main`, `axolotl.QKGuardPlugin`.
"""

from qkguard.integrations.after_save import restore_after_save

__all__ = ["restore_after_save"]
