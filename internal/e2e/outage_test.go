// This file takes away all backends of many clients that go on sending, for long
// enough that what is kept for them reaches its bounds, and lets them come back.

package e2e

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// All backends are away while the clients send more than may be kept: what is kept
// stays within replay_memory, and so does what the process needs for it; once the
// backend is back, the clients return a few at a time, and all that they sent arrives.
func TestOutage(t *testing.T) {
	clients, away, every, memory, concurrency := 300, 5*time.Second, 50*time.Millisecond, int64(8<<20), 16
	if full {
		clients, away, every, memory, concurrency = 2000, 20*time.Second, 200*time.Millisecond, 64<<20, 64
	}
	b := startOutageBackend(t)
	p := startBinary(t, fmt.Sprintf("metrics\nconnection_registry {\n replay_memory %d\n}", memory),
		fmt.Sprintf("websocket_proxy %s {\n resume_concurrency %d\n resume_timeout 60s\n}", b.addr, concurrency))
	c := startCrowd(t, p.addr, clients, func(int) time.Duration { return every })
	pass(long(time.Second, 3*time.Second))
	before := settledOrBusy(t, p)
	b.leave()

	var most int64
	var mostMemory float64
	watch := func(limit time.Duration, until func() bool) {
		for began := time.Now(); time.Since(began) < limit && !until(); pass(100 * time.Millisecond) {
			most = max(most, p.replayBytes(t))
			mostMemory = max(mostMemory, residentMemory(t, p.cmd.Process.Pid))
		}
	}
	began := time.Now()
	watch(20*time.Second, func() bool { return p.stats(t).ByState["held"] == clients })
	t.Logf("all held after %v", time.Since(began))
	watch(away-time.Since(began), func() bool { return false })
	watch(30*time.Second, func() bool { return most >= memory*9/10 })
	if got := p.stats(t); got.ByState["held"] != clients {
		t.Errorf("connections: got %v, want all %d held; ended: %v", got.ByState, clients, c.ended())
	}
	var wanted int64
	for _, m := range c.clients {
		wanted += m.sent.Load()
	}
	t.Logf("held: %d KiB of at most %d kept, resident memory %.0f KiB before, %.0f at most: %.0f more (%.2f of replay_memory); %d messages sent",
		most>>10, memory>>10, before, mostMemory, mostMemory-before, (mostMemory-before)*1024/float64(memory), wanted)
	b.come(100 * time.Millisecond)
	back := time.Now()
	watch(60*time.Second, func() bool { return p.stats(t).ByState["open"] == clients })
	t.Logf("all open after %v", time.Since(back))
	pass(long(500*time.Millisecond, 2*time.Second))
	c.stop()
	c.sending.Wait()
	t.Logf("all has been written %v after the return", time.Since(back))
	var missing int
	watch(30*time.Second, func() bool {
		got := b.delivered()
		missing = 0
		for _, m := range c.clients {
			if got[m.id] != int(m.sent.Load()) {
				missing++
			}
		}
		return missing == 0
	})
	if missing > 0 {
		t.Errorf("%d clients miss messages", missing)
	}
	var total int64
	for _, m := range c.clients {
		total += m.sent.Load()
	}
	t.Logf("%d messages in all, delivered %v after the return", total, time.Since(back))
	if most > memory || most < memory*9/10 {
		t.Errorf("caddy_connections_replay_bytes: got up to %d, want up to %d, not more", most, memory)
	}
	if !eventually(15*time.Second, func() bool { return p.replayBytes(t) == 0 }) {
		t.Errorf("caddy_connections_replay_bytes at the end: got %d", p.replayBytes(t))
	}
	if e := c.ended(); len(e) > 0 {
		t.Errorf("ended: %v", e)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range b.faults {
		t.Error(f)
	}
	t.Logf("handshakes at once: %d; re-dials: %d, spread over %v", b.mostAtOnce, len(b.came), b.came[len(b.came)-1].Sub(b.came[0]))
	if b.mostAtOnce > concurrency || b.mostAtOnce < concurrency/2 {
		t.Errorf("handshakes at once: got up to %d, want up to %d, not more", b.mostAtOnce, concurrency)
	}
}

func settledOrBusy(t *testing.T, p *process) float64 {
	var most float64
	for range 10 {
		most = max(most, residentMemory(t, p.cmd.Process.Pid))
		pass(100 * time.Millisecond)
	}
	return most
}

// With nothing to hold them back, the clients return at times of their own: not most of
// them in a quarter of the time that they have.
func TestOutageJitter(t *testing.T) {
	const clients = 500
	const bound = 2 * time.Second
	b := startOutageBackend(t)
	p := startBinary(t, "", fmt.Sprintf("websocket_proxy %s {\n resume_concurrency %d\n resume_interval 100ms %v\n}", b.addr, clients, bound))
	c := startCrowd(t, p.addr, clients, func(int) time.Duration { return 0 })
	b.leave()
	pass(5 * time.Second)
	b.come(0)
	if !eventually(20*time.Second, func() bool { return p.stats(t).ByState["open"] == clients }) {
		t.Fatalf("connections: %+v", p.stats(t))
	}
	b.mu.Lock()
	came := slices.Clone(b.came)
	b.mu.Unlock()
	slices.SortFunc(came, time.Time.Compare)
	most := 0
	for i, j := 0, 0; i < len(came); i++ {
		for came[i].Sub(came[j]) > bound/4 {
			j++
		}
		most = max(most, i-j+1)
	}
	t.Logf("%d re-dials over %v, at most %d in %v", len(came), came[len(came)-1].Sub(came[0]), most, bound/4)
	if most > clients*6/10 {
		t.Errorf("re-dials in %v: got %d of %d", bound/4, most, clients)
	}
	if e := c.ended(); len(e) > 0 {
		t.Errorf("ended: %v", e)
	}
}

// With replay_overflow close, who sends more than may be kept is told, nobody else.
func TestOverflowClose(t *testing.T) {
	const clients = 200
	b := startOutageBackend(t)
	p := startCaddy(t, "metrics", fmt.Sprintf("websocket_proxy %s {\n replay_buffer 20KiB\n replay_overflow close\n}", b.addr))
	before := p.stats(t).ClosedByReason["overflow"]
	c := startCrowd(t, p.addr, clients, func(i int) time.Duration {
		if i%2 == 0 {
			return 50 * time.Millisecond // 20 KB within a second
		}
		return 2 * time.Second // not before this test ends
	})
	pass(500 * time.Millisecond)
	b.leave()
	p.waitReason(t, "overflow", before, clients/2)
	b.come(0)
	if !eventually(15*time.Second, func() bool { s := p.stats(t); return s.ByState["open"] == s.Total }) {
		t.Errorf("connections: %+v", p.stats(t))
	}
	c.stop()
	c.sending.Wait()
	want := ending{Code: 1013, Reason: "too many messages while no backend is available", Clean: true}
	var got map[ending]int
	if !eventually(10*time.Second, func() bool { got = c.ended(); return got[want] >= clients/2 }) || got[want] != clients/2 || len(got) != 1 {
		t.Errorf("ended: got %v, want %d with 1013", got, clients/2)
	}
	if got := p.stats(t).ClosedByReason["overflow"] - before; got != clients/2 {
		t.Errorf("closed by reason overflow: got %d, want %d", got, clients/2)
	}
	var late []int
	if !eventually(10*time.Second, func() bool {
		got := b.delivered()
		late = nil
		for _, m := range c.clients {
			if m.end.Load() == nil && got[m.id] != int(m.sent.Load()) {
				late = append(late, m.id)
			}
		}
		return len(late) == 0
	}) {
		t.Errorf("clients %v miss messages", late)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range b.faults {
		t.Error(f)
	}
	for _, m := range c.clients {
		m.conn.Close()
	}
}
