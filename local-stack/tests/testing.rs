//! The helpers that every other crate's tests stand on: servers per process, a database per test.

use std::time::Duration;

use local_stack::testing;
use sqlx::{Connection, PgConnection};

async fn migrate(url: String) -> anyhow::Result<()> {
    let mut connection = PgConnection::connect(&url).await?;
    sqlx::query("create table notes (text text)").execute(&mut connection).await?;
    std::mem::forget(connection); // a pool that `migrate` does not close in time looks like this
    Ok(())
}

async fn notes(database: &testing::TestDatabase) -> i64 {
    let mut connection = PgConnection::connect(database.url()).await.expect("the test's database answers");
    sqlx::query("insert into notes values ('mine')").execute(&mut connection).await.expect("the template was migrated");
    sqlx::query_scalar("select count(*) from notes")
        .fetch_one(&mut connection)
        .await
        .expect("the test's database answers")
}

#[tokio::test]
async fn a_test_sees_only_what_it_wrote_itself() {
    assert_eq!(notes(&testing::database(migrate).await).await, 1);
}

/// The same servers, on the runtime of another test.
#[tokio::test]
async fn another_test_sees_only_what_it_wrote_itself() {
    assert_eq!(notes(&testing::database(migrate).await).await, 1);
}

#[tokio::test]
async fn databases_can_be_cloned_all_at_once() {
    let clones = (0..8).map(|_| tokio::spawn(async { notes(&testing::database(migrate).await).await }));
    for clone in clones.collect::<Vec<_>>() {
        assert_eq!(clone.await.expect("the clone was made"), 1);
    }
}

#[tokio::test]
async fn the_bus_of_a_test_has_jetstream() {
    let stream = async_nats::jetstream::new(testing::nats().await)
        .create_stream(async_nats::jetstream::stream::Config {
            name: "notes".to_owned(),
            max_age: Duration::from_secs(60),
            ..Default::default()
        })
        .await
        .expect("the user may make a stream");
    assert_eq!(stream.cached_info().state.messages, 0);
}
