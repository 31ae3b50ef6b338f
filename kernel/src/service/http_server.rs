//! The API's TCP side: listening, accepting, and carrying bytes between sockets and [`Connection`]s.
//!
//! HTTP itself, with its limits and timeouts, is nestling-api's. RFC 9293 (TCP) is smoltcp's. What is left is
//! bookkeeping: a socket that listens becomes a connection, so another must be listening before the next
//! frame is looked at, or a burst of clients would be refused.

#![forbid(unsafe_code)]

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use nestling_api::http::Connection;
use nestling_api::{Api, Clock, Node};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Duration;

const SECOND: u64 = 1_000_000_000;
/// Sockets at once. Another connection takes the place of the one that matters least, see
/// [`HttpServer::evict`].
const MAX_CONNECTIONS: usize = 256;
/// Sockets beyond these that have been reset and have yet to say so to their peer.
const MAX_RESETS: usize = 16;
/// Handshakes under way that are left alone when places run out.
const MAX_HALF_OPEN: usize = 64;
/// Sockets that listen while there is room.
const LISTENERS: usize = 2;
/// Buffers of a socket in bytes. What is sent is bounded by the buffer each round trip: 16 KiB at 10 ms are
/// 1.6 MB/s.
const RECEIVE_BUFFER: usize = 8 * 1024;
const TRANSMIT_BUFFER: usize = 16 * 1024;
/// A peer that answers nothing for this long is gone.
const PEER_TIMEOUT: Duration = Duration::from_secs(60);
/// A silent peer is asked this often whether it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// How long a client may take to complete the handshake, or to close after us, before its place is given
/// away.
const HALF_OPEN_NS: u64 = 10 * SECOND;
/// How long the last bytes of an answer may take to arrive after we have closed.
const FLUSH_NS: u64 = 60 * SECOND;
/// How long a connection we closed first is remembered for late segments, and how long a reset may take to be
/// sent.
const LINGER_NS: u64 = SECOND;

/// A socket with its connection.
struct Slot {
    socket: SocketHandle,
    connection: Option<Box<Connection>>,
    /// The socket's TCP state when last looked at, and since when it is in it.
    state: tcp::State,
    since: u64,
    /// The client's end of data was passed on.
    end_told: bool,
}

/// All connections of the node.
pub struct HttpServer {
    port: u16,
    slots: Vec<Slot>,
}

impl HttpServer {
    /// A server on a TCP port, listening.
    #[must_use]
    pub fn new(port: u16, sockets: &mut SocketSet<'static>) -> Self {
        let mut server = Self { port, slots: Vec::new() };
        server.listen(sockets, 0);
        server
    }

    /// Makes sure that new connections find a socket that listens, while there is room.
    pub fn listen(&mut self, sockets: &mut SocketSet<'static>, now: u64) {
        let (mut listening, mut open) = (0, 0);
        for slot in &mut self.slots {
            let state = sockets.get::<tcp::Socket<'_>>(slot.socket).state();
            slot.observe(state, now);
            listening += usize::from(state == tcp::State::Listen);
            open += usize::from(state != tcp::State::Closed);
        }
        while listening < LISTENERS && self.slots.len() < MAX_CONNECTIONS + MAX_RESETS {
            if open >= MAX_CONNECTIONS {
                if !self.evict(sockets, now) {
                    return;
                }
                open -= 1;
            }
            let buffer = |bytes| tcp::SocketBuffer::new(vec![0; bytes]);
            let mut socket = tcp::Socket::new(buffer(RECEIVE_BUFFER), buffer(TRANSMIT_BUFFER));
            // Answers are written whole, so there is nothing to wait for.
            socket.set_nagle_enabled(false);
            socket.set_timeout(Some(PEER_TIMEOUT));
            socket.set_keep_alive(Some(KEEP_ALIVE));
            if socket.listen(self.port).is_err() {
                log::error!("http: cannot listen on port {}", self.port);
                return;
            }
            let socket = sockets.add(socket);
            self.slots.push(Slot {
                socket,
                connection: None,
                state: tcp::State::Listen,
                since: now,
                end_told: false,
            });
            listening += 1;
            open += 1;
        }
    }

    /// Resets the connection that matters least, so that nobody keeps others out by only being there: the
    /// oldest handshake when there are many, else the oldest connection on which nothing is under way or
    /// whose client has not shown the token. False when all of them matter.
    fn evict(&mut self, sockets: &mut SocketSet<'static>, now: u64) -> bool {
        let half_open = |slot: &&mut Slot| slot.state == tcp::State::SynReceived;
        let many = self.slots.iter_mut().filter(half_open).count() > MAX_HALF_OPEN;
        let candidates = self.slots.iter_mut();
        let candidates = candidates.filter(|slot| if many { half_open(slot) } else { slot.can_be_evicted() });
        let Some(slot) = candidates.min_by_key(|slot| slot.since) else { return false };
        let socket = sockets.get_mut::<tcp::Socket<'_>>(slot.socket);
        socket.abort();
        slot.connection = None;
        slot.observe(socket.state(), now);
        true
    }

    /// Carries bytes both ways and lets every connection go on.
    pub fn poll(&mut self, sockets: &mut SocketSet<'static>, api: &mut Api, node: &mut dyn Node, now: Clock) {
        self.slots.retain_mut(|slot| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(slot.socket);
            slot.observe(socket.state(), now.monotonic_ns);
            slot.carry(socket, api, node, now);
            slot.observe(socket.state(), now.monotonic_ns);
            // A socket that was reset still has its peer until it has told it so.
            let told = socket.remote_endpoint().is_none();
            let keep = !slot.is_over(told, now.monotonic_ns);
            if !keep {
                // Dropping a socket that is not closed is silent; a peer that still sends is answered by a
                // reset.
                sockets.remove(slot.socket);
            }
            keep
        });
        self.listen(sockets, now.monotonic_ns);
    }

    /// When [`HttpServer::poll`] has to be called next, whatever arrives, in nanoseconds since boot.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        self.slots.iter().filter_map(Slot::deadline).min()
    }
}

impl Slot {
    fn observe(&mut self, state: tcp::State, now: u64) {
        if state != self.state {
            (self.state, self.since) = (state, now);
        }
    }

    /// How long the socket may stay in its state.
    fn patience(&self) -> Option<u64> {
        match self.state {
            tcp::State::TimeWait | tcp::State::Closed => Some(LINGER_NS),
            tcp::State::SynReceived | tcp::State::FinWait2 => Some(HALF_OPEN_NS),
            tcp::State::FinWait1 | tcp::State::Closing | tcp::State::LastAck => Some(FLUSH_NS),
            _ => None,
        }
    }

    fn is_over(&self, told: bool, now: u64) -> bool {
        let expired = self.patience().is_some_and(|patience| now >= self.since.saturating_add(patience));
        expired || (told && self.state == tcp::State::Closed)
    }

    fn can_be_evicted(&self) -> bool {
        match self.state {
            tcp::State::Listen | tcp::State::Closed => false,
            tcp::State::Established | tcp::State::CloseWait => {
                self.connection.as_ref().is_none_or(|connection| connection.can_be_evicted())
            }
            // The last bytes of an answer may be on their way.
            tcp::State::FinWait1 | tcp::State::Closing | tcp::State::LastAck => false,
            _ => true,
        }
    }

    fn deadline(&self) -> Option<u64> {
        let state = self.patience().map(|patience| self.since.saturating_add(patience));
        let connection = self.connection.as_ref().and_then(|connection| connection.deadline());
        state.into_iter().chain(connection).min()
    }

    fn carry(&mut self, socket: &mut tcp::Socket<'_>, api: &mut Api, node: &mut dyn Node, now: Clock) {
        if self.connection.is_none() {
            // The handshake is complete; a client may have sent and closed already.
            if !matches!(self.state, tcp::State::Established | tcp::State::CloseWait) {
                return;
            }
            self.connection = Some(Box::new(Connection::new(now)));
        }
        let Some(connection) = &mut self.connection else { return };
        loop {
            let mut progress = false;
            while socket.can_recv() && connection.receive_capacity() > 0 {
                let taken = socket.recv(|bytes| {
                    let count = connection.receive(bytes, now);
                    (count, count)
                });
                match taken {
                    Ok(count) if count > 0 => progress = true,
                    _ => break,
                }
            }
            if !self.end_told && !socket.may_recv() && !socket.can_recv() {
                self.end_told = true;
                connection.receive_closed();
                progress = true;
            }
            connection.advance(api, node, now);
            while socket.can_send() && !connection.transmit().is_empty() {
                match socket.send_slice(connection.transmit()) {
                    Ok(count) if count > 0 => {
                        connection.transmitted(count, now);
                        progress = true;
                    }
                    _ => break,
                }
            }
            if !progress {
                break;
            }
        }
        if connection.wants_abort() {
            socket.abort();
        } else if connection.wants_close() {
            socket.close();
        }
        if !socket.is_active() {
            self.connection = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::entropy::RandomSource;
    use super::super::node::NodeView;
    use super::super::testing::{FakeMachines, Wire, at, connected_uplinks, image};
    use super::super::uplink::Uplink;
    use super::*;
    use nestling_api::ApiConfig;

    const REQUEST: &[u8] = b"GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n";

    /// A node and a client on one cable.
    struct Net {
        node: Uplink,
        client: Uplink,
        to_client: Wire,
        server: HttpServer,
        api: Api,
        random: RandomSource,
        answers_are_lost: bool,
        ms: u64,
    }

    impl Net {
        fn new(queue: usize) -> Self {
            let (mut node, client, _, to_client) = connected_uplinks(queue);
            let server = HttpServer::new(80, &mut node.sockets);
            let random = RandomSource::gather(&[]);
            Self {
                node,
                client,
                to_client,
                server,
                api: Api::new(ApiConfig::default()),
                random,
                answers_are_lost: false,
                ms: 0,
            }
        }

        fn step(&mut self) {
            self.ms += 1;
            let now = at(self.ms);
            let Self { node, client, to_client, server, api, random, answers_are_lost, .. } = self;
            node.receive(now.monotonic_ns, |_, _| false, |sockets| server.listen(sockets, now.monotonic_ns));
            let images = [image("minimal")];
            let mut view = NodeView {
                name: "node",
                images: &images,
                image_problems: &[],
                uplink: node.describe(),
                machines: &FakeMachines::default(),
                templates: Vec::new(),
                running: 0,
                ready_ns: Some(1),
                random,
            };
            server.poll(&mut node.sockets, api, &mut view, now);
            node.transmit(now.monotonic_ns);
            // A SYN with its ACK has flag bit 1 set; the TCP header follows 14 bytes of Ethernet and 20 of
            // IPv4.
            if *answers_are_lost {
                to_client.borrow_mut().retain(|frame| frame.get(47).is_none_or(|flags| flags & 2 == 0));
            }
            client.receive(now.monotonic_ns, |_, _| false, |_| {});
            client.transmit(now.monotonic_ns);
        }

        fn run(&mut self, ms: u64) {
            (0..ms).for_each(|_| self.step());
        }

        fn connect(&mut self, port: u16) -> SocketHandle {
            let buffer = || tcp::SocketBuffer::new(vec![0; 4096]);
            let mut socket = tcp::Socket::new(buffer(), buffer());
            socket.set_nagle_enabled(false);
            let node = (core::net::Ipv4Addr::new(10, 0, 0, 1), 80);
            socket.connect(self.client.context(), node, port).unwrap();
            self.client.sockets.add(socket)
        }

        fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
            self.client.sockets.get_mut(handle)
        }

        fn received(&mut self, handle: SocketHandle) -> Vec<u8> {
            let mut bytes = vec![0; 4096];
            let count = self.socket(handle).recv_slice(&mut bytes).unwrap_or(0);
            bytes.truncate(count);
            bytes
        }
    }

    #[test]
    fn a_burst_of_200_connections_is_served_completely() {
        let mut net = Net::new(1000);
        let clients: Vec<_> = (0..200).map(|index| net.connect(10_000 + index)).collect();
        net.run(100);
        for client in &clients {
            net.socket(*client).send_slice(REQUEST).unwrap();
        }
        net.run(100);
        for client in clients {
            assert!(net.received(client).starts_with(b"HTTP/1.1 200 OK"));
        }
    }

    #[test]
    fn a_short_send_queue_only_slows_a_burst_down() {
        let mut net = Net::new(8);
        let clients: Vec<_> = (0..100).map(|index| net.connect(10_000 + index)).collect();
        net.run(3000);
        for client in &clients {
            net.socket(*client).send_slice(REQUEST).unwrap();
        }
        net.run(3000);
        for client in clients {
            assert!(net.received(client).starts_with(b"HTTP/1.1 200 OK"));
        }
    }

    #[test]
    fn silent_connections_keep_nobody_out_and_their_places_come_back() {
        let mut net = Net::new(1000);
        let silent: Vec<_> = (0..300).map(|index| net.connect(10_000 + index)).collect();
        net.run(200);
        assert!(net.server.slots.len() <= MAX_CONNECTIONS + MAX_RESETS);
        let client = net.connect(20_000);
        net.run(10);
        net.socket(client).send_slice(REQUEST).unwrap();
        net.run(10);
        assert!(net.received(client).starts_with(b"HTTP/1.1 200 OK"));
        let open = |net: &Net| {
            let active =
                |client: &&SocketHandle| net.client.sockets.get::<tcp::Socket<'_>>(**client).is_active();
            silent.iter().filter(active).count()
        };
        let before = open(&net);
        assert!((200..MAX_CONNECTIONS).contains(&before), "{before}: those beyond the limit were told");
        net.run(11_000);
        assert_eq!(open(&net), before, "the node has closed them, they have not");
        for client in silent {
            net.socket(client).close();
        }
        net.socket(client).close();
        net.run(3000);
        assert_eq!(net.server.slots.len(), LISTENERS);
    }

    #[test]
    fn a_client_whose_connection_is_given_up_is_told_by_a_reset() {
        let mut net = Net::new(1000);
        let client = net.connect(10_000);
        net.run(5);
        let now = at(net.ms).monotonic_ns;
        assert!(net.server.evict(&mut net.node.sockets, now));
        net.run(3);
        assert_eq!(net.socket(client).state(), tcp::State::Closed);
        assert_eq!(net.server.slots.len(), LISTENERS);
    }

    #[test]
    fn a_client_that_closes_its_half_at_once_gets_its_answer() {
        let mut net = Net::new(1000);
        let client = net.connect(10_000);
        net.run(5);
        net.socket(client).send_slice(REQUEST).unwrap();
        net.socket(client).close();
        net.run(20);
        assert!(net.received(client).starts_with(b"HTTP/1.1 200 OK"));
        net.run(12_000);
        assert_eq!(net.server.slots.len(), LISTENERS);
    }

    #[test]
    fn a_reset_connection_gives_its_place_back_at_once() {
        let mut net = Net::new(1000);
        let client = net.connect(10_000);
        net.run(5);
        net.socket(client).send_slice(b"GET /heal").unwrap();
        net.run(5);
        assert_eq!(net.server.slots.len(), LISTENERS + 1);
        net.socket(client).abort();
        net.run(5);
        assert_eq!(net.server.slots.len(), LISTENERS);
    }

    #[test]
    fn a_handshake_that_is_never_completed_does_not_keep_its_place() {
        let mut net = Net::new(1000);
        // So that both ends know each other's Ethernet address.
        net.connect(10_000);
        net.run(5);
        let known = net.server.slots.len();
        net.answers_are_lost = true;
        let client = net.connect(10_001);
        net.run(10);
        let during = net.server.slots.len();
        net.client.sockets.remove(client);
        net.run(HALF_OPEN_NS / 1_000_000 + 10);
        assert_eq!((during, net.server.slots.len()), (known + 1, known));
    }

    #[test]
    fn a_slow_head_is_answered_at_the_deadline_the_server_gave() {
        let mut net = Net::new(1000);
        let client = net.connect(10_000);
        net.run(5);
        net.socket(client).send_slice(b"GET /heal").unwrap();
        net.run(5);
        let deadline = net.server.deadline().unwrap() / 1_000_000;
        assert!((9_000..11_000).contains(&deadline), "{deadline}");
        net.ms = deadline;
        net.run(5);
        assert!(net.received(client).starts_with(b"HTTP/1.1 408"));
    }
}
