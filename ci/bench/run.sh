#!/bin/sh
# The loads of the benchmark's machine rows, the same in nestling's L2 and in the peer's. Every time is taken outside, between
# `MARK begin NAME` and `MARK end NAME`: clocks inside an emulated machine drift.
# run.sh SERVER STREAM_PORT ECHO_PORT LOAD...
set -eu
server=$1 stream=$2 echo=$3
shift 3
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C HOME=/root
data=/bench/data new=/bench/new

measure() {
    name=$1
    shift
    sync
    echo "MARK begin $name"
    "$@" >/bench/log 2>&1 || { cat /bench/log; echo "MARK failed $name"; exit 1; }
    echo "MARK end $name"
}

job() {
    fio --name=load --direct=1 --ioengine=libaio --group_reporting --output-format=terse "$@"
}

# 64 bytes there and back, one after another.
round_trips() {
    perl -MSocket -e '
        socket(my $s, PF_INET, SOCK_STREAM, 0) or die;
        connect($s, sockaddr_in($ARGV[1], inet_aton($ARGV[0]))) or die "connect: $!";
        setsockopt($s, 6, 1, 1);
        for (1 .. $ARGV[2]) {
            syswrite($s, "x" x 64) == 64 or die;
            for (my $have = 0; $have < 64;) { $have += sysread($s, my $b, 64 - $have) || die "read: $!" }
        }' "$server" "$echo" 2000
}

compile() {
    rm -rf /bench/build && mkdir /bench/build && cd /bench/build
    tar xzf /bench/source.tar.gz --strip-components=1
    make -C src generic CFLAGS=-O1
    ./src/lua -v
}

for load; do
    case $load in
        net-send) measure net-send iperf3 -c "$server" -p "$stream" -n 96M ;;
        net-receive) measure net-receive iperf3 -c "$server" -p "$stream" -n 96M -R ;;
        net-round-trips) measure net-round-trips round_trips ;;
        disk-read) measure disk-read job --filename=$data --rw=read --bs=1M --iodepth=4 --size=128M ;;
        disk-random-read) measure disk-random-read job --filename=$data --rw=randread --bs=4k --iodepth=1 --size=128M --io_size=8M ;;
        disk-write) rm -f $new; measure disk-write job --filename=$new --rw=write --bs=1M --iodepth=4 --size=96M ;;
        disk-random-write) measure disk-random-write job --filename=$new --rw=randwrite --bs=4k --iodepth=1 --size=96M --io_size=8M ;;
        disk-fsync) measure disk-fsync job --filename=$new --rw=randwrite --bs=4k --iodepth=1 --fsync=1 --size=96M --io_size=1M ;;
        compile) measure compile compile ;;
        idle) measure idle sleep 20 ;;
        *) echo "run.sh: there is no load $load"; exit 2 ;;
    esac
done
