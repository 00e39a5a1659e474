"""LlamaIndex, offline: nodes found by BM25 are sieved by a draft model before a target answers."""

from llama_index.core.schema import NodeWithScore, TextNode

from draftsieve import Engine, SpecPC
from draftsieve.integrations.llama_index import DraftSievePostprocessor
from draftsieve.retrievers import Bm25Index

TEXTS = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
    "Project Halvora began on 3 May 2041. Its budget is 420 crowns.",
]
QUESTION = "Which badge was issued to Mira Tolen?"

engine = Engine.load("builtin:target")
sieve = DraftSievePostprocessor(model="builtin:draft", method=SpecPC(ratio=0.5, unit="sentence"))
nodes = [
    NodeWithScore(node=TextNode(text=passage.text, id_=passage.id), score=score)
    for passage, score in Bm25Index.from_texts(TEXTS).search(QUESTION, k=3)
]
kept = sieve.postprocess_nodes(nodes, query_str=QUESTION)
print(engine.answer(QUESTION, [node.text for node in kept]).text)
for node in kept:
    print(node.node_id, node.score, repr(node.text), node.metadata["draftsieve"]["spans"])
