// Command demo shows Holdfast in a browser: it runs Caddy with a
// websocket_proxy in front of two small backends, and a page that talks to
// them and watches the connection registry. It needs nothing but Go:
//
//	go run ./cmd/demo [--listen 127.0.0.1:8080] [--admin 127.0.0.1:2019]
//
// This file holds the command line and the order of starting and stopping.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "backend" {
		os.Exit(exitCode(backendMain(args[1:])))
	}
	os.Exit(exitCode(demoMain(args)))
}

// backendMain is the process that a child runs. A Ctrl-C in the terminal
// reaches it as well as the demo; it is the demo that decides, so that Caddy
// stops before its backends do.
func backendMain(args []string) error {
	signal.Ignore(os.Interrupt)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()

	flags := flag.NewFlagSet("demo backend", flag.ContinueOnError)
	name := flags.String("name", "backend", "`name` that the answers carry")
	listen := flags.String("listen", "127.0.0.1:0", "`address` to listen on, port 0 for a free port")
	if err := parse(flags, args); err != nil {
		return err
	}
	return runBackend(ctx, *name, *listen, os.Stdin, os.Stdout)
}

func demoMain(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// From the first signal on, a second one kills as usual.
	context.AfterFunc(ctx, stop)

	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:8080", "`address` of the page, port 0 for a free port")
	admin := flags.String("admin", "127.0.0.1:2019", "`address` of Caddy's admin API, port 0 for a free port")
	if err := parse(flags, args); err != nil {
		return err
	}
	return runDemo(ctx, *listen, *admin, os.Stdout)
}

func parse(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			err = errReported
		}
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	return nil
}

// errReported is an error that the flag package has already printed.
var errReported = errors.New("bad command line")

func exitCode(err error) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errReported):
		return 2
	}
	fmt.Fprintln(os.Stderr, "demo:", err)
	return 1
}

// runDemo starts the backends, the page and Caddy, in that order, runs until
// ctx ends, and stops them the other way round.
func runDemo(ctx context.Context, listen, admin string, stdout io.Writer) error {
	// Both addresses are held until Caddy takes them, so that no backend is
	// given one of them as its free port.
	site, err := reserve("--listen", listen)
	if err != nil {
		return err
	}
	defer site.Close()
	api, err := reserve("--admin", admin)
	if err != nil {
		return err
	}
	defer api.Close()

	alder, birch := newChild("alder"), newChild("birch")
	for _, c := range []*child{alder, birch} {
		if err := c.start(); err != nil {
			return err
		}
		defer c.stop()
	}

	front, err := startFront(alder, birch)
	if err != nil {
		return err
	}
	defer front.stop()

	scratch, err := os.MkdirTemp("", "holdfast-demo-")
	if err != nil {
		return fmt.Errorf("making a directory for Caddy's storage: %w", err)
	}
	defer os.RemoveAll(scratch)

	config := demoConfig{
		Listen:   site.Addr().String(),
		Admin:    api.Addr().String(),
		Backends: []string{alder.address(), birch.address()},
		Front:    front.address(),
		Storage:  scratch,
	}
	site.Close()
	api.Close()
	stopCaddy, err := startCaddy(config)
	if err != nil {
		return err
	}
	defer stopCaddy()

	for _, c := range []*child{alder, birch} {
		fmt.Fprintf(stdout, "backend %s on %s, process %d\n", c.name, c.address(), c.pid())
	}
	fmt.Fprintf(stdout, "registry on http://%s/connections\n", config.Admin)
	fmt.Fprintf(stdout, "\nopen %s\n\n(Ctrl-C ends it)\n", config.URL())

	<-ctx.Done()
	fmt.Fprintln(stdout, "stopping")
	return nil
}
