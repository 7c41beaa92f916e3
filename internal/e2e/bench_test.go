package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// BenchmarkEcho measures a round trip through the proxy, beside reverse_proxy in
// the same run: its time, and the CPU time that the proxy's process takes.
//
//	go test -run '^$' -bench Echo -count 10 ./internal/e2e/
func BenchmarkEcho(b *testing.B) {
	backend := rawBackend(b, echoRaw)
	for _, size := range []int{64, 64 << 10} {
		for _, handler := range []string{"websocket_proxy", "reverse_proxy"} {
			b.Run(fmt.Sprintf("%d/%s", size, handler), func(b *testing.B) {
				benchmarkEcho(b, startBinary(b, "", handler+" "+backend), size)
			})
		}
	}
}

// benchmarkEcho lets 16 clients share b.N round trips.
func benchmarkEcho(b *testing.B, p *process, size int) {
	const clients = 16
	var conns [clients]*rawConn
	for i := range conns {
		res, c := rawRequest(b, p.addr, rawUpgrade(p.addr, ""))
		if res.StatusCode != http.StatusSwitchingProtocols {
			b.Fatalf("status %d", res.StatusCode)
		}
		_ = c.SetDeadline(time.Time{})
		conns[i] = c
	}
	message := frame.Append(nil, ws.OpBinary, make([]byte, size), true)
	b.SetBytes(int64(size))
	b.ResetTimer()
	before := cpuTime(b, p.cmd.Process.Pid)
	var wg sync.WaitGroup
	for i, c := range conns {
		n := b.N / clients
		if i < b.N%clients {
			n++
		}
		wg.Go(func() { roundTrips(b, c, message, size, n) })
	}
	wg.Wait()
	b.ReportMetric(float64(cpuTime(b, p.cmd.Process.Pid)-before)/float64(b.N)/1e3, "cpu-µs/op")
	b.StopTimer()
	for _, c := range conns {
		c.Close()
	}
}

func roundTrips(b *testing.B, c *rawConn, message []byte, size, n int) {
	for range n {
		if _, err := c.Write(message); err != nil {
			b.Error(err)
			return
		}
		for got := 0; got < size; {
			h, err := ws.ReadHeader(c.br)
			if err != nil {
				b.Error(err)
				return
			}
			if _, err := c.br.Discard(int(h.Length)); err != nil {
				b.Error(err)
				return
			}
			got += int(h.Length)
		}
	}
}

// cpuTime is what a process has used so far; the kernel counts in hundredths
// of a second.
func cpuTime(b testing.TB, pid int) time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	// The fields after the command's name, which may contain anything: utime
	// and stime are the 12th and 13th of them.
	_, rest, _ := strings.Cut(string(stat), ") ")
	var ticks int
	for _, field := range strings.Fields(rest)[11:13] {
		n, err := strconv.Atoi(field)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// BenchmarkReplay measures what replay costs while no backend is lost: the same
// messages through a proxy that keeps them until they are acknowledged and through
// one that does not, in turns, so that both meet the same machine. A ratio above 1
// says how much more CPU time per message replay takes, or how many more messages a
// second there are with it.
//
//	go test -run '^$' -bench Replay -count 10 ./internal/e2e/
func BenchmarkReplay(b *testing.B) {
	sunk := make(chan struct{}, 16)
	backend := rawBackend(b, func(r *http.Request, c *rawConn) { serveBench(r, c, sunk) })
	var sides [2]*process // replay unacked, replay off
	for i, replay := range [2]string{"unacked", "off"} {
		sides[i] = startBinary(b, "", "websocket_proxy "+backend+" {\n replay "+replay+"\n}")
	}
	for _, size := range []int{64, 64 << 10} {
		for _, way := range []string{"echo", "one-way"} {
			b.Run(fmt.Sprintf("%d/%s", size, way), func(b *testing.B) { benchmarkReplay(b, sides, size, way, sunk) })
		}
	}
}

// benchmarkReplay lets 16 clients of each proxy share b.N messages, in 20 turns.
func benchmarkReplay(b *testing.B, sides [2]*process, size int, way string, sunk <-chan struct{}) {
	const clients, turns = 16, 20
	var conns [2][clients]*rawConn
	for side, p := range sides {
		for i := range clients {
			request := strings.Replace(rawUpgrade(p.addr, ""), "x=1", way, 1)
			res, c := rawRequest(b, p.addr, request)
			if res.StatusCode != http.StatusSwitchingProtocols {
				b.Fatalf("status %d", res.StatusCode)
			}
			_ = c.SetDeadline(time.Time{})
			defer c.Close()
			conns[side][i] = c
		}
	}
	message := frame.Append(nil, ws.OpBinary, make([]byte, size), true)
	last := frame.Append(nil, ws.OpBinary, make([]byte, size-1), true)
	var cpu, wall [2]time.Duration
	b.SetBytes(2 * int64(size))
	b.ResetTimer()
	for turn := range turns {
		n := max(1, (b.N+turn)/turns/clients) // for each client
		for i := range sides {
			side := (i + turn) % 2
			before, began := cpuTime(b, sides[side].cmd.Process.Pid), time.Now()
			var wg sync.WaitGroup
			for _, c := range conns[side] {
				if way == "echo" {
					wg.Go(func() { roundTrips(b, c, message, size, n) })
				} else {
					wg.Go(func() { sendAll(b, c, message, last, n) })
				}
			}
			wg.Wait()
			if way != "echo" {
				for range clients {
					<-sunk
				}
			}
			wall[side] += time.Since(began)
			cpu[side] += cpuTime(b, sides[side].cmd.Process.Pid) - before
		}
	}
	b.StopTimer()
	b.ReportMetric(float64(cpu[0])/float64(cpu[1]), "cpu-ratio")
	b.ReportMetric(float64(wall[1])/float64(wall[0]), "rate-ratio")
	b.ReportMetric(float64(cpu[0])/float64(b.N)/1e3, "unacked-cpu-µs/msg")
	b.ReportMetric(float64(cpu[1])/float64(b.N)/1e3, "off-cpu-µs/msg")
}

func sendAll(b *testing.B, c *rawConn, message, last []byte, n int) {
	for i := range n {
		if i == n-1 {
			message = last
		}
		if _, err := c.Write(message); err != nil {
			b.Error(err)
			return
		}
	}
}

// serveBench echoes or, for a one-way client, notes when a message came that is one
// byte short: the last one of a turn. It answers pings.
func serveBench(r *http.Request, c *rawConn, sunk chan<- struct{}) {
	if c.accept(r) != nil {
		return
	}
	_ = c.SetDeadline(time.Time{})
	br := bufio.NewReaderSize(c.Conn, 72<<10)
	if early, _ := c.br.Peek(c.br.Buffered()); len(early) > 0 {
		br = bufio.NewReaderSize(io.MultiReader(bytes.NewReader(early), c.Conn), 72<<10)
	}
	echo := r.URL.RawQuery == "echo"
	var answer bytes.Buffer
	for {
		h, err := ws.ReadHeader(br)
		if err != nil {
			return
		}
		if !h.OpCode.IsControl() && !echo {
			if _, err := br.Discard(int(h.Length)); err != nil {
				return
			}
			if h.Length%2 == 1 {
				sunk <- struct{}{}
			}
			continue
		}
		mask := h.Mask
		h.Masked, h.Mask = false, [4]byte{}
		if h.OpCode == ws.OpPing {
			h.OpCode = ws.OpPong
		}
		answer.Reset()
		_ = ws.WriteHeader(&answer, h) // to memory
		head := answer.Len()
		if _, err := io.CopyN(&answer, br, h.Length); err != nil {
			return
		}
		if h.OpCode.IsControl() { // at the bytes of messages nobody looks
			ws.Cipher(answer.Bytes()[head:], mask, 0)
		}
		if _, err := c.Write(answer.Bytes()); err != nil || h.OpCode == ws.OpClose {
			return
		}
	}
}
