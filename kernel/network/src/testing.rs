//! What tests of several modules share.

/// DNS messages.
pub(crate) mod dns {
    use alloc::vec::Vec;

    fn name(name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend(label.bytes());
        }
        bytes.push(0);
        bytes
    }

    /// A query of one question.
    pub(crate) fn query(id: u16, host: &str, kind: u16) -> Vec<u8> {
        let mut message = id.to_be_bytes().to_vec();
        message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        message.extend(name(host));
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    fn record(host: &str, kind: u16, data: &[u8]) -> Vec<u8> {
        let mut record = name(host);
        record.extend(kind.to_be_bytes());
        record.extend([0, 1, 0, 0, 0, 60]);
        record.extend((data.len() as u16).to_be_bytes());
        record.extend(data);
        record
    }

    /// An A record.
    pub(crate) fn address(host: &str, address: [u8; 4]) -> Vec<u8> {
        record(host, 1, &address)
    }

    /// A CNAME record.
    pub(crate) fn alias(host: &str, to: &str) -> Vec<u8> {
        record(host, 5, &name(to))
    }

    /// The answer to a query.
    pub(crate) fn answer(query: &[u8], records: &[Vec<u8>]) -> Vec<u8> {
        let mut message = query.to_vec();
        message[2] |= 0x80;
        message[7] = records.len() as u8;
        message.extend(records.concat());
        message
    }
}
