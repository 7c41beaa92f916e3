package e2e

import (
	"fmt"
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
	before := cpuTime(b, p)
	var wg sync.WaitGroup
	for i, c := range conns {
		n := b.N / clients
		if i < b.N%clients {
			n++
		}
		wg.Go(func() { roundTrips(b, c, message, size, n) })
	}
	wg.Wait()
	b.ReportMetric(float64(cpuTime(b, p)-before)/float64(b.N)/1e3, "cpu-µs/op")
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

// cpuTime is what the process has used so far; the kernel counts in hundredths
// of a second.
func cpuTime(b *testing.B, p *process) time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
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
