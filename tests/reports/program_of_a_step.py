"""Stands for a command of a collection: runs its second argument, to which the first is known as folder."""

import sys

folder = sys.argv[1]
exec(sys.argv[2])
