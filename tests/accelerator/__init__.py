"""Tests on the twin device, a pretended accelerator. They run in processes of their own, the second run of `make test`.

torch's autograd starts a thread for each device that it knows. A process with such threads cannot fork and then train,
as many other tests do. So nothing outside this package may import `tests.support.twin`.
"""
