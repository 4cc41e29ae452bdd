"""What the tests are written with; fixtures stand in conftest.py.

answers         assertions on answers: the one error shape, clear, reset, health, stats
browser         a headless Chromium
clock           a wall clock that runs as a test wants
causes          hung, dead and busy Ollamas and runners, made on purpose
deaf_ollama     an Ollama that takes requests, and never answers those of one kind
fake_ollama     an Ollama that answers whatever a test wants
faults          what a registry does at one step of a pull, instead of its work
frozen          a process whose main thread stands while the others go on
generation      a long answer under way
given_time      time that passes where the code under test waits
gpu_ollama      a real Ollama that takes the machine for one with a GPU
held            a thread held by ptrace, as one whose work never returns
line_server     an upstream that sends lines when a test says so
listener        a client of a streamed pull
models          a real small model, and model stores written without Ollama
names           model names that Ollama takes, and such that it does not take
nonsense        what an Ollama should never answer, and a program that answers it
nvml            a stand-in for NVIDIA's library
ollama_server   a real Ollama without the service
page_stub       a stand-in for the service that plays answers back to the page
places          folders, and the mark by which a run's processes are found
ports           free ports
processes       finding and ending what a test has started
proxies         eight proxies, each with its configuration
ptrace          a decode loop that stands
raw             requests written byte by byte
registry        a model registry with faults
service         the service as ./start.sh starts it
tls             a company's certificate authority
strangers       a server and its callers in processes of their own
waiting         one HTTP call, and waiting for something to become true
watches         a watch whose looks are made by hand
"""
