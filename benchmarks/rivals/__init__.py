"""The same network behind other servers, each built as its own documentation does it.

python -m benchmarks.rivals.NAME --model {null,rednet} --port P --workers N

Every one decodes photos with this project's decoder, on two cores, runs batches of up to eight, and answers with the
same classes. The null model's answer is made from the photo's mean colours: what it costs is the server.
"""
