//! Any bytes as lines of the control socket, on both of its sides.

use ploopfs::control::protocol::{Answer, Interim, Request, VERSION, parse_request};

pub fn control_protocol(data: &[u8]) {
    for line in data.split(|byte| *byte == b'\n') {
        match parse_request(line) {
            Ok(op) => {
                let again = serde_json::to_vec(&Request { v: VERSION, op: op.clone() }).expect("plain data");
                assert_eq!(parse_request(&again).expect("our own line"), op);
            }
            // What a client is told goes to its terminal and the log.
            Err(e) => assert!(e.to_string().len() <= 4096 + 2 * line.len()),
        }
        if let Ok(answer) = serde_json::from_slice::<Answer>(line) {
            let again = serde_json::to_vec(&answer).expect("plain data");
            assert_eq!(serde_json::from_slice::<Answer>(&again).expect("our own line"), answer);
        }
        let _ = serde_json::from_slice::<Interim>(line);
    }
}
