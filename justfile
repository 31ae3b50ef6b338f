# Short names for the commands of the README; `just` lists them. Nothing here knows more than `cargo xtask --help`.

[private]
default:
    @just --list --unsorted

# Build everything, start a node, run a real job, show what it cost
demo *ARGS:
    cargo xtask demo {{ARGS}}

# Run a command as a job: just run uname -a
run *COMMAND:
    cargo run --quiet --release -p nestling -- run -- {{COMMAND}}

# Every check, or those named: just test host, just test a_triple_fault
test *NAMES:
    cargo xtask test {{NAMES}}

# The tests that hold on every bed, on one: just bed bochs, just bed bochs:ryzen same_job
bed BED *NAMES:
    cargo xtask test --bed {{BED}} {{NAMES}}

# Every CPU model of the list, in Bochs; for the night
matrix *MODELS:
    cargo xtask matrix {{MODELS}}

# Compare with a Linux L1 running KVM and QEMU
bench *ARGS:
    cargo xtask bench {{ARGS}}

# Build a guest image
image NAME="minimal":
    cargo xtask image {{NAME}}

# Formatting and lints
lint:
    cargo xtask lint

# Licences, sources and duplicates of the dependencies (needs cargo-deny)
deny:
    cargo deny --all-features check bans licenses sources
