//! A claim about what lies between a service and its database: connections that fall silent cost seconds, not the service.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api_contract::{Access, Scopes};
use sqlx::{Connection, PgConnection};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::access::{database, log_in, new_client, seal};

/// Several bounds of seconds one after another, on a machine that has other things to do.
const HEALED_WITHIN: Duration = Duration::from_secs(60);

/// A way to the database at `url` on which those connections that are there can fall silent for ever. Both ends stay open.
async fn way_to(url: &str) -> (String, Arc<Notify>) {
    let (before, rest) = url.rsplit_once("127.0.0.1:").unwrap();
    let (server, name) = rest.split_once('/').unwrap();
    let server: u16 = server.parse().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let way = format!("{before}127.0.0.1:{}/{name}", listener.local_addr().unwrap().port());
    let silence = Arc::new(Notify::new());
    let told = silence.clone();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let silence = told.clone();
            tokio::spawn(async move {
                let mut server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                    () = silence.notified() => std::future::pending().await,
                }
            });
        }
    });
    (way, silence)
}

#[tokio::test]
async fn connections_that_fall_silent_in_the_midst_of_logins_are_replaced() {
    let database = database().await;
    let (way, silence) = way_to(database.url()).await;
    let access = Access::connect(&way, seal()).await.unwrap();
    let client = new_client(None, Scopes::ADMIN);
    log_in(&access, &client).await;

    // Logins that wait for a lock take all connections, and these fall silent.
    let mut owner = PgConnection::connect(database.url()).await.unwrap();
    let mut lock = owner.begin().await.unwrap();
    sqlx::query("lock table access.clients in access exclusive mode").execute(&mut *lock).await.unwrap();
    let mut logins = JoinSet::new();
    for _ in 0..8 {
        let (access, client) = (access.clone(), client.clone());
        logins.spawn(async move { access.issue(&client.id.to_string(), &client.secret).await.is_ok() });
    }
    let waiting = "select count(*) >= 4 from pg_locks where not granted and relation = 'access.clients'::regclass";
    while !sqlx::query_scalar::<_, bool>(waiting).fetch_one(&mut *lock).await.unwrap() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    silence.notify_waiters();
    lock.rollback().await.unwrap();

    let silent = Instant::now();
    while tokio::time::timeout(HEALED_WITHIN, access.issue(&client.id.to_string(), &client.secret))
        .await
        .is_ok_and(|issued| issued.is_err())
    {
        assert!(silent.elapsed() < HEALED_WITHIN, "no login succeeds any more");
    }
    assert!(silent.elapsed() < HEALED_WITHIN, "a login waits for ever");
    let ended = tokio::time::timeout(HEALED_WITHIN, logins.join_all()).await;
    assert!(ended.is_ok(), "those that met the silence are never answered");
    eprintln!("logins succeed again, and all are answered, after {:?}", silent.elapsed());
}
