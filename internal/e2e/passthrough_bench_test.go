// This file measures what relaying costs, beside caddy-l4's proxy and HAProxy.

package e2e

import (
	"io"
	"sync"
	"testing"
	"time"
)

// BenchmarkRelay measures relays that choose the backend by the server name of a
// ClientHello: sni_passthrough, caddy-l4's proxy, and HAProxy, which splices, with as many
// threads as it likes and with one. They are measured in turns, in random order, so that
// all meet the same machine; each ratio is one of the same turn. Memory and CPU time are
// those of the proxy's process alone.
//
//	go test -run '^$' -bench Relay -count 10 ./internal/e2e/
//
// A metric like KiB/conn÷haproxy is what sni_passthrough has, over what HAProxy has. The
// last log line of each figure has the medians and the ranges of all runs.
func BenchmarkRelay(b *testing.B) {
	backend := tcpBackend(b, serveRelayed)
	var relays []*contender
	for _, k := range contenders {
		relays = append(relays, k.start(b, k.name, backend))
	}
	for _, m := range []struct {
		name    string
		measure func(b testing.TB, r *contender) []float64
		figures []string
	}{
		{"bulk", bulkCost, []string{"cpu-s/GB", "GB/s"}},
		{"pingpong", pingPongCost, []string{"cpu-µs/op", "op/s"}},
		{"connect", connectCost, []string{"cpu-µs/conn", "conn/s"}},
	} {
		c := newComparison(m.figures...)
		b.Run(m.name, func(b *testing.B) {
			c.run(b, func(kind int) []float64 { return m.measure(b, relays[kind]) })
		})
	}
	// What a process keeps of many connections would hide what they cost: new ones.
	c := newComparison("KiB/conn", "KiB/conn-used")
	b.Run("memory", func(b *testing.B) {
		c.run(b, func(kind int) []float64 {
			r := contenders[kind].start(b, contenders[kind].name, backend)
			defer r.stop()
			idle, used := idleCost(b, r)
			return []float64{idle.resident, used.resident}
		})
	})
}

// bulkCost is the CPU time per gigabyte, half of it up and half of it down, and
// how many there are a second.
func bulkCost(b testing.TB, r *contender) []float64 {
	const clients, size = 4, 256 << 20 // each way, of each client
	spent, took := r.cost(b, clients, func() {
		c := dialRelay(b, r, orderUp, size)
		defer c.Close()
		buf := make([]byte, chunk)
		for range size / chunk {
			_, _ = c.Write(buf) // whether all have come is what the answer says
		}
		if _, err := io.ReadFull(c, buf[:1]); err != nil {
			b.Errorf("%s: upload: %v", r.name, err)
			return
		}
		d := dialRelay(b, r, orderDown, size)
		defer d.Close()
		if got := drain(d, buf); got != size {
			b.Errorf("%s: download: got %d bytes, want %d", r.name, got, size)
		}
	})
	gb := float64(2*clients*size) / 1e9
	return []float64{spent.Seconds() / gb, gb / took.Seconds()}
}

// pingPongCost is the CPU time of a round trip of 64 bytes, and how many there are a
// second: 16 clients, each with one on its way.
func pingPongCost(b testing.TB, r *contender) []float64 {
	const clients, each = 16, 5000
	spent, took := r.cost(b, clients, func() {
		c := dialRelay(b, r, orderEcho, 0)
		defer c.Close()
		buf := make([]byte, 64)
		for range each {
			if !roundTrip(c, buf) {
				b.Errorf("%s: no echo", r.name)
				return
			}
		}
	})
	return []float64{float64(spent.Nanoseconds()) / 1e3 / (clients * each), clients * each / took.Seconds()}
}

// connectCost is the CPU time of a connection with one request and one answer of 64
// bytes, from its first packet until both sides have closed, and how many there are a
// second: 16 clients, one after the other each.
func connectCost(b testing.TB, r *contender) []float64 {
	const clients, each = 16, 250
	spent, took := r.cost(b, clients, func() {
		buf := make([]byte, 64)
		for range each {
			c := dialRelay(b, r, orderEcho, 0)
			ok := roundTrip(c, buf)
			_ = c.CloseWrite()
			if ok = ok && drain(c, buf) == 0; !ok {
				b.Errorf("%s: no echo, or more than that", r.name)
			}
			c.Close()
		}
	})
	return []float64{float64(spent.Nanoseconds()) / 1e3 / (clients * each), clients * each / took.Seconds()}
}

// idleCost is the memory of an idle connection, as it is after the ClientHello and after
// it has echoed 64 KiB.
func idleCost(b testing.TB, r *contender) (idle, used memory) {
	const clients = 2000
	// What the first connections cost once is not what each costs.
	for range 100 {
		c := dialRelay(b, r, orderEcho, 0)
		roundTrip(c, make([]byte, chunk/4))
		_ = c.CloseWrite()
		drain(c, make([]byte, 1))
		c.Close()
	}
	before := r.memory(b)
	conns := make([]io.ReadWriteCloser, clients)
	for i := range conns {
		c := dialRelay(b, r, orderEcho, 0)
		defer c.Close()
		if !roundTrip(c, []byte{1}) {
			b.Fatalf("%s: no echo", r.name)
		}
		conns[i] = c
	}
	idle = r.memory(b).since(before, clients)
	var wg sync.WaitGroup
	for part := range 20 {
		wg.Go(func() {
			buf := make([]byte, chunk/4)
			for i := part; i < clients; i += 20 {
				if !roundTrip(conns[i], buf) {
					b.Errorf("%s: no echo", r.name)
					return
				}
			}
		})
	}
	wg.Wait()
	return idle, r.memory(b).since(before, clients)
}

// cost runs as many clients at once and returns the CPU time of the relay's process
// meanwhile, and the time.
func (r *contender) cost(b testing.TB, clients int, client func()) (spent, took time.Duration) {
	before, began := cpuTime(b, r.pid), time.Now()
	var wg sync.WaitGroup
	for range clients {
		wg.Go(client)
	}
	wg.Wait()
	took = time.Since(began)
	return cpuTime(b, r.pid) - before, took
}
