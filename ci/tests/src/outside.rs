//! What machines reach on the host's loopback: servers of a test's own.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Sends everything back that it receives.
pub struct Echo {
    port: u16,
    accepted: Arc<AtomicUsize>,
}

impl Echo {
    /// Serves until the process ends.
    ///
    /// # Panics
    /// When the host has no free port.
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::SeqCst);
                thread::spawn(move || echo(&stream));
            }
        });
        Self { port, accepted }
    }

    /// Its TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connections so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

fn echo(mut stream: &TcpStream) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
}

/// Answers every question for an IPv4 address with the same one (RFC 1035), and others with nothing.
pub struct Dns {
    port: u16,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Dns {
    /// Serves until the process ends.
    ///
    /// # Panics
    /// When the host has no free port.
    pub fn start(address: [u8; 4]) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let port = socket.local_addr().expect("an address").port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let names = Arc::clone(&asked);
        thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let Some((name, answer)) = answer(&buffer[..length], address) else { continue };
                names.lock().expect("no panic before").push(name);
                let _ = socket.send_to(&answer, from);
            }
        });
        Self { port, asked }
    }

    /// Its UDP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The names it was asked for.
    ///
    /// # Panics
    /// When the server has panicked.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("no panic before").clone()
    }
}

/// The name in a query, and the answer to it.
fn answer(query: &[u8], address: [u8; 4]) -> Option<(String, Vec<u8>)> {
    let mut at = 12;
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).into_owned());
        at += length;
    }
    let question = query.get(12..at + 4)?;
    let wants_address = question.ends_with(&[0, 1, 0, 1]);
    let mut answer = query.get(..2)?.to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(wants_address), 0, 0, 0, 0]);
    answer.extend(question);
    if wants_address {
        // The name by a pointer to the question, class and type, a minute to live.
        answer.extend([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address);
    }
    Some((labels.join("."), answer))
}
