//! Clients that are slow, or very many: each is cut off in its time, and the others do not notice.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures::future::join_all;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::system::System;
use crate::wire::{Request, exchange};

/// What a machine that is busy may add to a limit in time.
const GENEROUS: Duration = Duration::from_secs(20);

#[tokio::test]
async fn clients_that_are_slow_are_cut_off_and_nobody_waits_for_them() {
    let mut system = System::start(&[]).await;
    let (_, moved) = system.log_position().await;
    let body = system.transfer_body().to_string();
    let head = String::from_utf8(system.transfer_request().bytes()).unwrap();
    let lines = format!("\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    let head = head.trim_end().to_owned() + &lines;
    let begun = format!("{head}{}", &body[..9]);
    let address = system.address;
    let others = tokio::spawn(async move {
        let begun = Instant::now();
        let mut slowest = Duration::ZERO;
        while begun.elapsed() < Duration::from_secs(20) {
            let answer = exchange(address, &Request::get("/healthz").bytes(), false).await.unwrap();
            assert_eq!(answer.status, 200);
            slowest = slowest.max(answer.took);
            sleep(Duration::from_millis(100)).await;
        }
        slowest
    });
    let (silent, header, late_header, slow_body, cut_body, idle) = tokio::join!(
        trickle(address, b"", b"", Duration::from_secs(1)),
        trickle(
            address,
            b"",
            b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Slow: a very long value indeed\r\n\r\n",
            Duration::from_secs(1)
        ),
        trickle(
            address,
            b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Slow: yes",
            Duration::from_secs(1)
        ),
        trickle(address, head.as_bytes(), &body.as_bytes()[..40], Duration::from_secs(1)),
        trickle(address, begun.as_bytes(), b"", Duration::from_secs(1)),
        trickle(address, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"", Duration::from_secs(1)),
    );
    for (name, (said, took), limit, statuses) in [
        ("51 a client that connects and says nothing", silent, 10, &[][..]),
        ("51 a header of a byte in a second", header, 10, &["408"]),
        ("51 a second header of a byte in a second", late_header, 20, &["200", "408"]),
        ("51 a body of a byte in a second", slow_body, 15, &["408"]),
        ("51 a body that ends in the middle", cut_body, 15, &["408"]),
        ("51 silence after an answer", idle, 60, &["200"]),
    ] {
        println!("{name}: closed after {took:?}");
        let found: Vec<&str> = said.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
        assert_eq!(found, statuses, "{name}: {said}");
        assert!(took < Duration::from_secs(limit) + GENEROUS, "{name}: closed after {took:?}");
        if statuses.last() == Some(&"408") {
            assert!(
                said.contains("application/problem+json") && said.contains("/problems/request-timeout"),
                "{name}: {said}"
            );
        }
    }
    println!("meanwhile the slowest answer to others took {:?}", others.await.unwrap());
    assert_eq!(system.log_position().await.1, moved, "half a transfer is none");
    assert!(system.complaints().is_empty());
}

#[tokio::test]
async fn five_thousand_open_sockets_cost_their_owner_an_answer_and_nobody_else_anything() {
    const SOCKETS: usize = 5_000;
    const PLACES: usize = 1_024;
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    assert!(
        limit.maximum.is_none_or(|most| 6_000 < most),
        "this test opens {SOCKETS} sockets, and the limit is {limit:?}"
    );
    let mut system = System::start(&[]).await;
    let address = system.address;

    // Somebody who was there before: its place is its own.
    let mut regular = TcpStream::connect(address).await.unwrap();
    ask_on(&mut regular).await;
    let begun = Instant::now();
    let open_some = || async move {
        let mut sockets = Vec::new();
        for _ in 0..SOCKETS / 50 {
            sockets.push(TcpStream::connect(address).await.unwrap());
        }
        sockets
    };
    let mut sockets: Vec<TcpStream> = join_all((0..50).map(|_| open_some())).await.into_iter().flatten().collect();
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        let begun = Instant::now();
        ask_on(&mut regular).await;
        slowest = slowest.max(begun.elapsed());
    }
    println!("beside {SOCKETS} sockets the slowest of 50 answers took {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "beside {SOCKETS} sockets an answer took {slowest:?}");

    // Those beyond the places are told so and closed. A place is given away again when its holder has been silent for ten
    // seconds, which a machine that is slow at opening sockets may come to see.
    let mut refused = 0;
    loop {
        let mut open = Vec::with_capacity(sockets.len());
        for socket in sockets {
            let mut said = [0; 512];
            match socket.try_read(&mut said) {
                Ok(0) => {} // was silent for too long
                Ok(count) => {
                    let said = String::from_utf8_lossy(&said[..count]).to_lowercase();
                    assert!(said.starts_with("http/1.1 503"), "{said}");
                    assert!(said.contains("retry-after") && said.contains("/problems/overloaded"), "{said}");
                    refused += 1;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => open.push(socket),
                Err(error) => panic!("a socket broke: {error}"),
            }
        }
        sockets = open;
        let held = PLACES * usize::try_from(1 + begun.elapsed().as_secs() / 10).unwrap();
        if sockets.len() <= PLACES && SOCKETS - held.min(SOCKETS) <= refused {
            break;
        }
        assert!(begun.elapsed() < 2 * GENEROUS, "{refused} of {SOCKETS} were turned away, {} are open", sockets.len());
        sleep(Duration::from_millis(50)).await;
    }
    println!("{refused} of {SOCKETS} were turned away, {} kept a place", sockets.len());
    assert!(PLACES < refused, "only {refused} of {SOCKETS} were turned away");
    drop(sockets);

    // When they have gone, there is room again.
    let begun = Instant::now();
    loop {
        match exchange(address, &Request::get("/healthz").bytes(), false).await {
            Ok(answer) if answer.status == 200 => break,
            other => assert!(begun.elapsed() < GENEROUS, "no room: {other:?}"),
        }
        sleep(Duration::from_millis(50)).await;
    }
    assert!(system.complaints().is_empty());
}

/// Sends the beginning at once and the rest a byte at a time, and reads until the server closes. How long that took.
async fn trickle(address: SocketAddr, at_once: &[u8], slowly: &[u8], pause: Duration) -> (String, Duration) {
    let begun = Instant::now();
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut reading, mut writing) = stream.into_split();
    let write = async {
        writing.write_all(at_once).await.ok();
        for byte in slowly {
            sleep(pause).await;
            if writing.write_all(&[*byte]).await.is_err() {
                break;
            }
        }
        std::future::pending::<()>().await; // the socket stays open
    };
    let mut said = Vec::new();
    let read = timeout(Duration::from_secs(120), reading.read_to_end(&mut said));
    tokio::select! {
        read = read => { read.expect("the server closes a slow connection").ok(); }
        () = write => {}
    }
    (String::from_utf8_lossy(&said).into_owned(), begun.elapsed())
}

async fn ask_on(stream: &mut TcpStream) {
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut said = [0; 4096];
    let count = timeout(GENEROUS, stream.read(&mut said)).await.expect("an answer").unwrap();
    assert!(said[..count].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&said[..count]));
}
