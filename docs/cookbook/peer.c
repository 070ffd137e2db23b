// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The programs that have a problem in the cookbook:
 *   peer send ADDRESS PORT COUNT BYTES   sends UDP packets
 *   peer deaf PORT                       has a UDP socket and never reads it
 *   peer busy PORT BACKLOG               listens on TCP and never accepts
 *   peer connect ADDRESS PORT MS         connects, gives up after MS milliseconds
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct sockaddr_in address(const char *host, const char *port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };

	inet_pton(AF_INET, host, &to.sin_addr);
	return to;
}

static int wait_forever(void)
{
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}

static int send_udp(struct sockaddr_in to, int count, int bytes)
{
	static char payload[65000];
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	while (count-- > 0)
		if (sendto(fd, payload, bytes, 0, (void *)&to, sizeof(to)) < 0)
			perror("sendto");
	return 0;
}

static int try_connect(struct sockaddr_in to, int ms)
{
	int fd = socket(AF_INET, SOCK_STREAM, 0), error = 0;
	struct pollfd wait = { .fd = fd, .events = POLLOUT };
	socklen_t len = sizeof(error);

	fcntl(fd, F_SETFL, O_NONBLOCK);
	if (connect(fd, (void *)&to, sizeof(to)) < 0 && errno != EINPROGRESS) {
		perror("connect");
		return 1;
	}
	if (poll(&wait, 1, ms) == 0) {
		printf("no answer within %d ms\n", ms);
		return 1;
	}
	getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len);
	printf("%s\n", error ? strerror(error) : "connected");
	return error != 0;
}

int main(int argc, char **argv)
{
	struct sockaddr_in here;

	if (argc == 6 && !strcmp(argv[1], "send"))
		return send_udp(address(argv[2], argv[3]), atoi(argv[4]), atoi(argv[5]));
	if (argc == 5 && !strcmp(argv[1], "connect"))
		return try_connect(address(argv[2], argv[3]), atoi(argv[4]));
	if (argc < 3)
		return 2;
	here = address("0.0.0.0", argv[2]);
	if (!strcmp(argv[1], "deaf"))
		return bind(socket(AF_INET, SOCK_DGRAM, 0), (void *)&here, sizeof(here)) ? 1 : wait_forever();
	if (!strcmp(argv[1], "busy") && argc == 4) {
		int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;

		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		return bind(fd, (void *)&here, sizeof(here)) || listen(fd, atoi(argv[3])) ? 1 : wait_forever();
	}
	return 2;
}
