"""Baselines: other servers around the same network, each built as in its own documentation, and other ways to run it.

python -m benchmarks.baselines.NAME --model {null,rednet} --port P --workers N

Every server decodes photos with this project's decoder, on two cores, runs batches of up to eight, and answers with the
same classes. The null model computes its result from the photo's mean colours, so that its cost is that of the server.
"""
