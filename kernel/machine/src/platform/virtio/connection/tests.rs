use super::*;

#[test]
fn a_header_survives_encoding() {
    let header = Header {
        src_cid: 0x0102_0304_0506_0708,
        dst_cid: 2,
        src_port: 0x1122_3344,
        dst_port: 1024,
        len: 5,
        kind: 1,
        op: op::RW,
        flags: 3,
        buf_alloc: 0xFFFF_FFFF,
        fwd_cnt: 7,
    };
    let bytes = header.to_bytes();
    assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(bytes[28..32], [1, 0, 5, 0], "type and operation");
    assert_eq!(Header::from_bytes(&bytes), header);
}

#[test]
fn bytes_leave_in_order_around_the_end_of_the_ring() {
    let mut queue: VecDeque<u8> = VecDeque::with_capacity(8);
    let (mut next_in, mut next_out) = (0_u8, 0_u8);
    for _ in 0..100 {
        while queue.len() < 7 {
            queue.push_back(next_in);
            next_in = next_in.wrapping_add(1);
        }
        let mut into = [0; 5];
        assert_eq!(take_front(&mut queue, &mut into), 5);
        for byte in into {
            assert_eq!(byte, next_out);
            next_out = next_out.wrapping_add(1);
        }
    }
    assert_eq!(take_front(&mut queue, &mut [0; 64]), 2);
    assert_eq!(take_front(&mut queue, &mut [0; 64]), 0);
}

#[test]
fn counters_that_wrap_do_not_change_the_credit() {
    let mut host = VsockHost::new(3);
    host.state = VsockState::Connected;
    host.sent = 5;
    host.guest_fwd_cnt = 0xFFFF_FFFB;
    host.guest_buf_alloc = 100;
    assert_eq!(host.guest_credit(), 90);
    host.guest_buf_alloc = 4;
    assert_eq!(host.guest_credit(), 0, "a guest may shrink its buffer below what is under way");
}
